"""Reads a split of prepared data: one long stream of token ids over memory-mapped shards."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.manifest import FileRecord, Manifest, read_manifest
from moe_runtime.data.tokenizer import load_tokenizer
from moe_runtime.data.vocabulary import Ids, Tokenizer
from moe_runtime.errors import DataError

# Splits below this are checksummed whenever they are opened: it takes a fraction of a second.
VERIFIED_BYTES = 256 * 1024 * 1024


class TokenDataset:
    """The token stream of one split; sizes of all files are checked when it is opened.

    Args:
        folder: a folder made by `prepare`.
        manifest: its manifest.
        split: train or validation.
    """

    def __init__(self, folder: Path, manifest: Manifest, split: Literal["train", "validation"]) -> None:
        if split not in manifest.splits:
            raise DataError(f"{folder}: no {split} split in its manifest; prepare the data again")
        self.folder, self.manifest, self.split = folder, manifest, split
        self.record = manifest.splits[split]
        self.num_tokens = self.record.tokens
        self.max_id = self.record.max_id
        self._dtype = np.dtype(manifest.dtype).newbyteorder("<")
        self._check_sizes()
        shards = self.record.shards
        self._maps = [np.memmap(folder / shard.file, dtype=self._dtype, mode="r") for shard in shards]
        self._masks = [np.memmap(folder / mask.file, dtype=np.uint8, mode="r") for mask in self.record.masks]
        self._ends = np.cumsum([shard.tokens for shard in shards], dtype=np.int64)

    @classmethod
    def open(
        cls, path: str | Path, split: Literal["train", "validation"] = "train", verify: bool | None = None
    ) -> "TokenDataset":
        """Open a split of a prepared folder.

        Args:
            verify: compare every file with its sha256; None: only if the split is below 256 MiB.

        Raises:
            DataError: no data there, a file missing, truncated or changed.
        """
        folder = Path(path)
        dataset = cls(folder, read_manifest(folder), split)
        size = sum(file.bytes for file in dataset._files())
        if verify or (verify is None and size < VERIFIED_BYTES):
            dataset.verify()
        return dataset

    @property
    def is_masked(self) -> bool:
        """Some tokens are no targets."""
        return bool(self._masks)

    def read(self, start: int, count: int) -> Ids:
        """`count` ids from position `start` of the stream, int64; past the end it goes on at the start."""
        ids = np.empty(count, dtype=np.int64)
        for done, shard, inside, length in self._pieces(start, count):
            ids[done : done + length] = self._maps[shard][inside : inside + length]
        return ids

    def read_targets(self, start: int, count: int) -> NDArray[np.bool_]:
        """Which of the same tokens are to be predicted, bool [count]."""
        targets = np.ones(count, dtype=np.bool_)
        for done, shard, inside, length in self._pieces(start, count) if self._masks else ():
            first = inside // 8
            packed = self._masks[shard][first : (inside + length + 7) // 8]
            bits = np.unpackbits(packed, bitorder="little")[inside - 8 * first :]
            targets[done : done + length] = bits[:length]
        return targets

    def locate(self, position: int) -> str:
        """File and byte offset of a position of the stream, for messages."""
        shard, inside = self._place(position)
        return f"{self.folder / self.record.shards[shard].file}, byte {inside * self._dtype.itemsize}"

    def _pieces(self, start: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """What of each shard makes up a stretch: (place in the stretch, shard, first token, tokens)."""
        done = 0
        while done < count:
            shard, inside = self._place(start + done)
            length = min(count - done, len(self._maps[shard]) - inside)
            yield done, shard, inside, length
            done += length

    def _place(self, position: int) -> tuple[int, int]:
        """Shard of a position of the stream, and the token within it."""
        position %= self.num_tokens
        shard = int(np.searchsorted(self._ends, position, side="right"))
        return shard, position - (int(self._ends[shard]) - len(self._maps[shard]))

    def document_starts(self) -> NDArray[np.uint64]:
        """Position of the first token of each document, then the length of the stream; memory-mapped."""
        return np.memmap(self.folder / self.record.index.file, dtype="<u8", mode="r")

    def document_parts(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Which part of the source each document is of, int64 [documents], and the names of the parts.

        A folder that does not record them is one part, named as its source.
        """
        names, record = self.record.part_names, self.record.parts
        if record is None:
            return np.zeros(self.record.documents, dtype=np.int64), (self.manifest.source,)
        return np.fromfile(self.folder / record.file, dtype="<u2").astype(np.int64), names

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids.

        Raises:
            DataError: its file is missing or was changed.
        """
        record = self.manifest.tokenizer
        self._check_digest(record.record)
        return load_tokenizer(self.folder / record.record.file, record.name)

    def verify(self) -> None:
        """Compare every file of the split with its sha256.

        Raises:
            DataError: names the first file that differs.
        """
        for file in self._files():
            self._check_digest(file)

    def _files(self) -> tuple[FileRecord, ...]:
        parts = () if self.record.parts is None else (self.record.parts,)
        return (*self.record.shards, *self.record.masks, self.record.index, *parts)

    def _check_digest(self, file: FileRecord) -> None:
        path = self.folder / file.file
        try:
            with path.open("rb") as stream:
                got = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; prepare the data again") from error
        if got != file.sha256:
            raise DataError(
                f"{path}: damaged: expected sha256 {file.sha256[:16]}..., got {got[:16]}...; "
                "prepare the data again"
            )

    def _check_sizes(self) -> None:
        for file in self._files():
            path = self.folder / file.file
            got = path.stat().st_size if path.is_file() else None
            if got != file.bytes:
                found = "no such file" if got is None else f"got {got}"
                raise DataError(f"{path}: expected {file.bytes} bytes, {found}; prepare the data again")
        tokens = sum(shard.tokens for shard in self.record.shards)
        sizes = all(shard.bytes == shard.tokens * self._dtype.itemsize > 0 for shard in self.record.shards)
        if tokens != self.record.tokens or tokens == 0 or not sizes:
            raise DataError(
                f"{self.folder}: token counts of the {self.split} split do not add up in the manifest"
            )
        masks = [mask.bytes for mask in self.record.masks]
        if masks and masks != [(shard.tokens + 7) // 8 for shard in self.record.shards]:
            raise DataError(f"{self.folder}: masks of the {self.split} split do not fit its shards")
