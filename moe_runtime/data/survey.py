"""The first pass over a source: which documents are kept, and which of them validate.

A document is known by the hash of its text. Of equal documents the first is kept. The documents with
the smallest hashes, as many as the fraction says and at least one, are the validation split: exact for
any number of documents (a plain threshold on the hash would leave a small corpus without validation),
disjoint from training by content, and the same whatever the order, seed or tokenizer.

Each chunk is surveyed by itself, by any process: its hashes go to a file, sorted. Then one process merges
them range by range of the hash, `BUCKET` documents at a time, so that neither pass needs memory that grows
with the corpus. What becomes of each document is a byte in `FATES`, in the order of the source.

Hashes are compared by 64 bits: 13 bytes of disk a document while a preparation runs; among n documents the
chance that two different ones are taken for equal, so that one is left out, is n^2 / 2^65 (10^7 documents:
3e-6).
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.documents import Document
from moe_runtime.data.sources import Chunk, Source, read_chunk
from moe_runtime.data.task import Tick
from moe_runtime.data.writer import replace_file
from moe_runtime.errors import DataError

BUCKET = 2**21
FATES = "fates.bin"
DROPPED, TRAINS, VALIDATES = 0, 1, 2
_COUNTED = ("documents", "empty", "binary_files", "not_utf8")


class Kept(NamedTuple):
    """A document that belongs to a split."""

    document: Document
    num_bytes: int
    digest: bytes
    is_validation: bool


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Args:
        folder: where the files of the survey lie.
        firsts: number of each chunk's first document that is not empty; then how many there are in all.
        num_bytes: UTF-8 bytes of all documents, duplicates included.
        counts: documents, duplicates, empty, binary_files, not_utf8.
    """

    folder: Path
    firsts: tuple[int, ...]
    num_bytes: int
    counts: dict[str, int]


def survey_chunk(source: Source, chunk: Chunk, index: int, folder: Path, tick: Tick) -> None:
    """Hash every document of a chunk; its files are whole once the last one is there."""
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTED, 0))
    digests, num_bytes = bytearray(), 0
    for document in read_chunk(chunk, source.form, counts):
        raw = document.text.encode()
        counts["documents"] += 1
        counts["empty"] += not raw
        num_bytes += len(raw)
        if raw:
            digests += document_digest(raw)[:8]
        tick(counts["read_bytes"])
    keys = np.frombuffer(digests, dtype="<u8")
    order = np.argsort(keys, kind="stable").astype("<u4")
    replace_file(folder / f"{index:06d}.keys", keys[order].tobytes())
    replace_file(folder / f"{index:06d}.places", order.tobytes())
    facts = {"found": len(keys), "bytes": num_bytes, "counts": {name: counts[name] for name in _COUNTED}}
    replace_file(folder / f"{index:06d}.json", json.dumps(facts).encode())


def is_surveyed(index: int, folder: Path) -> bool:
    """The chunk's files are whole."""
    return (folder / f"{index:06d}.json").is_file()


def merge_surveys(source: Source, num_chunks: int, folder: Path, validation_fraction: float) -> Survey:
    """Decide the fate of every document from the surveys of all chunks.

    Args:
        validation_fraction: share of the distinct documents, 0..1.

    Raises:
        DataError: fewer than two distinct documents.
    """
    facts = [json.loads((folder / f"{index:06d}.json").read_bytes()) for index in range(num_chunks)]
    counts = {name: sum(one["counts"][name] for one in facts) for name in _COUNTED}
    firsts = np.cumsum([0] + [one["found"] for one in facts])
    total = int(firsts[-1])
    merged = _Merged(folder, num_chunks, firsts)
    distinct = sum(len(keys) for keys, _ in merged.buckets())
    counts = {"documents": counts["documents"], "duplicates": total - distinct, **counts}
    if distinct < 2:
        seen = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"source {source.name}: expected at least 2 different documents, to split into training and "
            f"validation; got {distinct} ({seen})"
        )
    left = min(max(1, round(validation_fraction * distinct)), distinct - 1)
    fates = np.memmap(folder / FATES, dtype=np.uint8, mode="w+", shape=(total,))
    for _, places in merged.buckets():  # in the order of the keys: the smallest come first
        fates[places] = TRAINS
        fates[places[:left]] = VALIDATES
        left = max(0, left - len(places))
    fates.flush()
    return Survey(folder, tuple(map(int, firsts)), sum(one["bytes"] for one in facts), counts)


class _Merged:
    """Distinct keys of all chunks in ascending order, with the first document of each."""

    def __init__(self, folder: Path, num_chunks: int, firsts: NDArray[np.int64]) -> None:
        self._firsts = firsts
        names = [str(folder / f"{index:06d}") for index in range(num_chunks)]
        self._keys = [_mapped(f"{name}.keys", "<u8") for name in names]
        self._places = [_mapped(f"{name}.places", "<u4") for name in names]

    def buckets(self) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """Ranges of keys: the distinct keys of each, ascending, and the number of each one's document."""
        bits = max(0, (int(self._firsts[-1]) // BUCKET).bit_length())
        for bucket in range(2**bits):
            low, high = bucket << (64 - bits), (bucket + 1) << (64 - bits)
            keys, numbers = [], []
            for first, own, places in zip(self._firsts, self._keys, self._places, strict=False):
                start = int(np.searchsorted(own, np.uint64(low))) if bucket else 0
                end = int(np.searchsorted(own, np.uint64(high))) if high < 2**64 else len(own)
                keys.append(own[start:end])
                numbers.append(places[start:end].astype(np.int64) + first)
            # Stable, and chunks come in order: of equal keys the first document stays the first.
            joined = np.concatenate(keys)
            order = np.argsort(joined, kind="stable")
            joined = joined[order]
            is_first = np.concatenate([[True], joined[1:] != joined[:-1]]) if len(joined) else order > 0
            yield joined[is_first], np.concatenate(numbers)[order][is_first]


def kept_of(source: Source, chunk: Chunk, index: int, survey: Survey, counts: Counter[str]) -> Iterator[Kept]:
    """The documents of a chunk that belong to a split, in the order of the source.

    Raises:
        DataError: the source changed since the survey.
    """
    first, last = survey.firsts[index : index + 2]
    keys = np.empty(last - first, dtype=np.uint64)
    keys[_mapped(f"{survey.folder / f'{index:06d}'}.places", "<u4")] = _mapped(
        f"{survey.folder / f'{index:06d}'}.keys", "<u8"
    )
    fates = _mapped(str(survey.folder / FATES), np.uint8)[first:last]
    number = 0
    for document in _read_again(source, chunk, counts):
        raw = document.text.encode()
        digest = document_digest(raw)
        if number == len(keys) or keys[number] != document_key(digest):
            raise DataError(f"source {source.name}: {document.name} changed while being read; start again")
        fate = fates[number]
        number += 1
        if fate != DROPPED:
            yield Kept(document, len(raw), digest, fate == VALIDATES)
    if number < len(keys):
        raise DataError(f"source {source.name}: documents went missing while it was read; start again")


def _read_again(source: Source, chunk: Chunk, counts: Counter[str]) -> Iterator[Document]:
    """Documents that are not empty. What was readable in the first pass must be so in the second."""
    try:
        for document in read_chunk(chunk, source.form, counts):
            if document.text:
                yield document
    except DataError as error:
        raise DataError(f"source {source.name} changed while being read ({error}); start again") from error


def document_digest(raw: bytes) -> bytes:
    """Hash of a document's UTF-8 bytes, 16 bytes."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def document_key(digest: bytes) -> np.uint64:
    """The part of the hash that splits and deduplicates."""
    return np.uint64(int.from_bytes(digest[:8], "little"))


def _mapped(file: str, dtype: Any) -> NDArray[Any]:
    """A file as an array, memory-mapped; an empty file cannot be."""
    return np.memmap(file, dtype=dtype, mode="r") if os.path.getsize(file) else np.empty(0, dtype=dtype)
