"""Writes one split as shards of token ids, an index of documents, and their checksums.

Everything streams: what is held in memory is one document and the state of a checksum.
"""

import hashlib
import os
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from moe_runtime.data.manifest import FileRecord, ShardRecord, SplitRecord
from moe_runtime.data.vocabulary import Ids

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


class SplitWriter:
    """The stream of one split, cut into shards of at most `shard_tokens` tokens.

    Args:
        folder: an existing folder.
        split: train or validation; begins the names of the files.
        dtype: uint16 or uint32, stored little-endian.
        shard_tokens: tokens a shard; a document may cross a border.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self._folder, self._split, self._shard_tokens = folder, split, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shards: list[ShardRecord] = []
        self._index = HashedFile(folder / f"{split}_documents.bin")
        self._parts = HashedFile(folder / f"{split}_parts.bin")
        self._part_ids: dict[str, int] = {}
        self._shard: HashedFile | None = None
        self._tokens = self._documents = self._bytes = self._fim_documents = self._max_id = 0

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._index.abandon()
            self._parts.abandon()
            if self._shard is not None:
                self._shard.abandon()

    def add(self, ids: Ids, num_bytes: int, is_fim: bool = False, part: str = ".") -> None:
        """Append one document.

        Args:
            ids: int64 [tokens], the end of the document included.
            num_bytes: UTF-8 bytes of its text.
            is_fim: it was rewritten prefix-suffix-middle.
            part: of the source that it belongs to.
        """
        self._index.write(self._tokens.to_bytes(8, "little"))
        self._parts.write(self._part_id(part).to_bytes(2, "little"))
        self._documents += 1
        self._bytes += num_bytes
        self._fim_documents += is_fim
        self._max_id = max(self._max_id, int(ids.max()))
        while ids.size:
            if self._shard is None:
                self._shard = HashedFile(self._folder / f"{self._split}_{len(self._shards):05d}.bin")
            room = self._shard_tokens - self._shard.bytes // self._dtype.itemsize
            self._shard.write(ids[:room].astype(self._dtype).tobytes())
            self._tokens += len(ids[:room])
            ids = ids[room:]
            if ids.size:
                self._close_shard()

    def close(self) -> SplitRecord:
        """Finish all files of the split."""
        self._close_shard()
        self._index.write(self._tokens.to_bytes(8, "little"))
        return SplitRecord(
            tokens=self._tokens,
            documents=self._documents,
            bytes=self._bytes,
            fim_documents=self._fim_documents,
            max_id=self._max_id,
            shards=tuple(self._shards),
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
            self._shards.append(ShardRecord(**record.model_dump(), tokens=tokens))
