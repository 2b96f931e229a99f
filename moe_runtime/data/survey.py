"""The first pass over a source: which documents are kept, and which of them validate.

A document is known by the hash of its text. Of equal documents the first is kept. The documents with
the smallest hashes, as many as the fraction says and at least one, are the validation split: exact for
any number of documents (a plain threshold on the hash would leave a small corpus without validation),
disjoint from training by content, and the same whatever the order, seed or tokenizer.

Hashes are compared by 64 bits: 9 bytes of memory a document; among n documents the chance that two
different ones are taken for equal, so that one is left out, is n^2 / 2^65 (10^7 documents: 3e-6).
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.sources import Source
from moe_runtime.errors import DataError

# Called with (what is being done, UTF-8 bytes done, bytes in all or None while unknown).
Progress = Callable[[str, int, int | None], None]


class Kept(NamedTuple):
    """A document that belongs to a split; `part` as in `sources.Document`."""

    text: str
    part: str
    num_bytes: int
    digest: bytes
    is_validation: bool


@dataclass(frozen=True)
class Survey:
    """What the first pass found.

    Args:
        keys: uint64 [documents], sorted and unique: the first 8 bytes of each document's hash.
        num_validation: documents with the smallest keys, which validate.
        num_bytes: UTF-8 bytes of all documents, duplicates included.
        counts: documents, duplicates, empty, binary_files, not_utf8.
    """

    keys: NDArray[np.uint64]
    num_validation: int
    num_bytes: int
    counts: dict[str, int]

    def kept(self, source: Source) -> Iterator[Kept]:
        """The documents of the splits, in the order of the source.

        Raises:
            DataError: the source changed since the survey.
        """
        seen = np.zeros(len(self.keys), dtype=bool)
        for document in source.read(Counter()):
            if not document.text:
                continue
            raw = document.text.encode()
            digest = document_digest(raw)
            place = int(np.searchsorted(self.keys, document_key(digest)))
            if place == len(self.keys) or self.keys[place] != document_key(digest):
                raise DataError(
                    f"source {source.name}: {document.name} changed while being read; start again"
                )
            if not seen[place]:
                seen[place] = True
                yield Kept(document.text, document.part, len(raw), digest, place < self.num_validation)


def take_survey(source: Source, validation_fraction: float, progress: Progress) -> Survey:
    """Read the source once and decide what is kept and what validates.

    Args:
        validation_fraction: share of the distinct documents, 0..1.

    Raises:
        DataError: fewer than two distinct documents, or the source cannot be read.
    """
    counts: Counter[str] = Counter(documents=0, duplicates=0, empty=0, binary_files=0, not_utf8=0)
    digests, num_bytes = bytearray(), 0
    for document in source.read(counts):
        raw = document.text.encode()
        counts["documents"] += 1
        counts["empty"] += not raw
        num_bytes += len(raw)
        if raw:
            digests += document_digest(raw)[:8]
        progress("reading", num_bytes, None)
    found = np.frombuffer(digests, dtype="<u8")
    keys = np.unique(found)
    counts["duplicates"] = len(found) - len(keys)
    if len(keys) < 2:
        seen = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(
            f"source {source.name}: expected at least 2 different documents, to split into training and "
            f"validation; got {len(keys)} ({seen})"
        )
    num_validation = min(max(1, round(validation_fraction * len(keys))), len(keys) - 1)
    return Survey(keys, num_validation, num_bytes, dict(counts))


def document_digest(raw: bytes) -> bytes:
    """Hash of a document's UTF-8 bytes, 16 bytes."""
    return hashlib.blake2b(raw, digest_size=16).digest()


def document_key(digest: bytes) -> np.uint64:
    """The part of the hash that splits and deduplicates."""
    return np.uint64(int.from_bytes(digest[:8], "little"))
