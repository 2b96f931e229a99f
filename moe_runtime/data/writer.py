"""Writes one split as shards of token ids, an index of documents, and their checksums.

Everything streams: what is held in memory is one block, the state of a checksum, and the mask of one shard.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.manifest import FileRecord, ShardRecord, SplitRecord

SHARD_TOKENS = 64 * 1024 * 1024
# Parts of a source that are told apart; a file that names more (an address a document, say) is not a list of
# sources, and the rest are one part.
MAX_PARTS = 1000
OTHER_PARTS = "(other)"


class HashedFile:
    """A file being written, with its sha256 and size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._stream: BinaryIO = path.open("wb")

    def write(self, raw: bytes) -> None:
        self._stream.write(raw)
        self._digest.update(raw)
        self.bytes += len(raw)

    def close(self) -> FileRecord:
        """Flush to the disk and say what was written."""
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
        finally:
            self._stream.close()
        return FileRecord(file=self.path.name, bytes=self.bytes, sha256=self._digest.hexdigest())

    def abandon(self) -> None:
        """Close without a word; a disk that is full fails once more at flushing, which changes nothing."""
        try:
            self._stream.close()
        except OSError:
            return


def write_file(path: Path, raw: bytes) -> FileRecord:
    """Write a whole file through to the disk."""
    file = HashedFile(path)
    try:
        file.write(raw)
        return file.close()
    except BaseException:
        file.abandon()
        raise


def replace_file(path: Path, raw: bytes) -> None:
    """Write a whole file, or none of it; another process may write the same at the same time."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_bytes(raw)
    part.replace(path)


class SplitWriter:
    """The stream of one split, cut into shards of at most `shard_tokens` tokens.

    Args:
        folder: an existing folder.
        split: train or validation; begins the names of the files.
        dtype: uint16 or uint32, stored little-endian.
        shard_tokens: tokens a shard; a document may cross a border.
        is_masked: write beside each shard which of its tokens are targets.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        dtype: str,
        shard_tokens: int = SHARD_TOKENS,
        is_masked: bool = False,
    ) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._is_masked = is_masked
        self._shards: list[ShardRecord] = []
        self._masks: list[FileRecord] = []
        self._index = HashedFile(folder / f"{split}_documents.bin")
        self._parts = HashedFile(folder / f"{split}_parts.bin")
        self._part_ids: dict[str, int] = {}
        self._shard: HashedFile | None = None
        self._mask: list[NDArray[np.bool_]] = []
        self._tokens = self._listed = self._documents = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            for file in (self._index, self._parts, self._shard):
                if file is not None:
                    file.abandon()

    def add_documents(
        self, lengths: NDArray[np.integer[Any]], parts: NDArray[np.integer[Any]], part_names: Sequence[str]
    ) -> None:
        """List documents; their tokens come by `add_tokens`, before or after.

        Args:
            lengths: tokens of each, the ends of documents included.
            parts: place of each one's part in `part_names`.
        """
        ends = self._listed + np.cumsum(lengths.astype(np.uint64), dtype=np.uint64)
        starts = np.concatenate([np.array([self._listed], dtype=np.uint64), ends[:-1]])
        self._index.write(starts.astype("<u8").tobytes())
        ids = np.array([self._part_id(part_names[part]) for part in np.unique(parts)], dtype="<u2")
        self._parts.write(ids[np.searchsorted(np.unique(parts), parts)].tobytes())
        self._listed = int(ends[-1])
        self._documents += len(lengths)

    def add_tokens(self, ids: NDArray[np.integer[Any]], targets: NDArray[np.bool_] | None = None) -> None:
        """Append tokens.

        Args:
            targets: which of them are to be predicted; None: all.
        """
        while ids.size:
            if self._shard is None:
                self._shard = HashedFile(self._folder / f"{self._split}_{len(self._shards):05d}.bin")
            room = self._shard_tokens - self._shard.bytes // self._dtype.itemsize
            self._shard.write(ids[:room].astype(self._dtype).tobytes())
            if self._is_masked:
                own = np.ones(len(ids[:room]), dtype=np.bool_) if targets is None else targets[:room]
                self._mask.append(own)
            self._tokens += len(ids[:room])
            ids, targets = ids[room:], None if targets is None else targets[room:]
            if ids.size:
                self._close_shard()

    def close(self, totals: Mapping[str, int]) -> SplitRecord:
        """Finish all files of the split.

        Args:
            totals: bytes of text, fim_documents, max_id, and targets.
        """
        assert self._listed == self._tokens, f"{self._listed} tokens listed, {self._tokens} written"
        self._close_shard()
        self._index.write(self._tokens.to_bytes(8, "little"))
        return SplitRecord(
            tokens=self._tokens,
            documents=self._documents,
            bytes=totals["bytes"],
            fim_documents=totals.get("fim_documents", 0),
            max_id=totals["max_id"],
            shards=tuple(self._shards),
            masks=tuple(self._masks),
            targets=totals["targets"] if self._is_masked else None,
            index=self._index.close(),
            part_names=tuple(self._part_ids),
            parts=self._parts.close(),
        )

    def _part_id(self, part: str) -> int:
        if part not in self._part_ids and len(self._part_ids) >= MAX_PARTS:
            part = OTHER_PARTS
        return self._part_ids.setdefault(part, len(self._part_ids))

    def _close_shard(self) -> None:
        if self._shard is not None:
            record, self._shard = self._shard.close(), None
            tokens = record.bytes // self._dtype.itemsize
            if self._is_masked:
                name = f"{self._split}_mask_{len(self._shards):05d}.bin"
                packed = np.packbits(np.concatenate(self._mask), bitorder="little")
                self._masks.append(write_file(self._folder / name, packed.tobytes()))
                self._mask = []
            self._shards.append(ShardRecord(**record.model_dump(), tokens=tokens))
