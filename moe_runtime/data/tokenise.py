"""Documents of one chunk to ids: the pieces that `assemble` makes shards of.

A piece is the part of one split that comes out of one chunk: files of ids, lengths and parts of its
documents, and targets where some tokens are none. Any process may make it, at any time, and makes the same
bytes.

Text is tokenised in parts where a document is rewritten for infill, and where targets begin or end. A prompt
is so tokenised as it will be when a model is asked, with nothing of its answer in its last token.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.documents import pieces_of
from moe_runtime.data.fim import cut_document, join_parts
from moe_runtime.data.sources import Chunk, Source
from moe_runtime.data.survey import Kept, Survey, kept_of
from moe_runtime.data.task import Request, Tick
from moe_runtime.data.vocabulary import Ids, Tokenizer
from moe_runtime.data.writer import replace_file

# Texts go to the tokenizer in batches of about this size, which it spreads over the cores.
BATCH_BYTES = 4 * 1024 * 1024
SPLITS = ("train", "validation")


class Tokenised(NamedTuple):
    """One document.

    Args:
        ids: int64 [tokens], the end of the document included.
        targets: bool [tokens], which of them are to be predicted; None: all.
        is_fim: it was rewritten prefix-suffix-middle.
    """

    ids: Ids
    targets: NDArray[np.bool_] | None
    is_fim: bool


def tokenise_chunk(
    source: Source,
    chunk: Chunk,
    index: int,
    survey: Survey,
    tokenizer: Tokenizer,
    request: Request,
    folder: Path,
    tick: Tick,
) -> None:
    """Write the pieces of a chunk; they are whole once the last file is there.

    Raises:
        DataError: the source changed since the survey.
        OSError: the disk is full.
    """
    counts: Counter[str] = Counter()
    dtype = ids_dtype(tokenizer)
    writers = {split: PieceWriter(folder, f"{index:06d}_{split}", dtype) for split in SPLITS}
    try:
        for batch in _batches(kept_of(source, chunk, index, survey, counts)):
            for kept, tokenised in zip(batch, _tokenised(batch, tokenizer, request), strict=True):
                writer = writers["validation" if kept.is_validation else "train"]
                writer.add(tokenised, kept.num_bytes, kept.document.part)
            tick(counts["read_bytes"])
        facts = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    replace_file(folder / f"{index:06d}.json", json.dumps(facts).encode())


def is_tokenised(index: int, folder: Path) -> bool:
    """The pieces of the chunk are whole."""
    return (folder / f"{index:06d}.json").is_file()


def ids_dtype(tokenizer: Tokenizer) -> str:
    """In how many bits ids are stored."""
    return "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"


class PieceWriter:
    """Files of one piece under temporary names until it is closed: ids, lengths, parts.

    And from the first document with a mask on, targets, a byte a token of the whole piece.
    """

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self._stem, self._dtype = folder / name, np.dtype(dtype).newbyteorder("<")
        kinds = ("ids", "lengths", "parts", "targets")
        self._paths = {kind: folder / f"{name}.{kind}.{os.getpid()}" for kind in kinds}
        self._files = {kind: path.open("wb") for kind, path in self._paths.items() if kind != "targets"}
        self._parts: dict[str, int] = {}
        self._facts: Counter[str] = Counter(
            dict.fromkeys(("tokens", "documents", "bytes", "fim_documents", "max_id", "targets"), 0)
        )

    def add(self, document: Tokenised, num_bytes: int, part: str) -> None:
        """Append a document of `num_bytes` of text."""
        ids, count = document.ids, len(document.ids)
        if document.targets is not None and "targets" not in self._files:
            self._files["targets"] = self._paths["targets"].open("wb")
            self._files["targets"].write(b"\1" * self._facts["tokens"])  # all before are
        if "targets" in self._files:
            targets = np.ones(count, dtype=np.bool_) if document.targets is None else document.targets
            self._files["targets"].write(targets.tobytes())
        self._files["ids"].write(ids.astype(self._dtype).tobytes())
        self._files["lengths"].write(count.to_bytes(8, "little"))
        self._files["parts"].write(self._parts.setdefault(part, len(self._parts)).to_bytes(4, "little"))
        own = {"documents": 1, "fim_documents": int(document.is_fim)}
        num_targets = count if document.targets is None else int(document.targets.sum())
        self._facts.update(own, tokens=count, bytes=num_bytes, targets=num_targets)
        self._facts["max_id"] = max(self._facts["max_id"], int(ids.max()))

    def close(self) -> dict[str, object]:
        """Put the files in their place; gives what the piece holds."""
        for kind, file in self._files.items():
            file.close()
            self._paths[kind].replace(f"{self._stem}.{kind}")
        return {**self._facts, "part_names": list(self._parts), "has_mask": "targets" in self._files}

    def abandon(self) -> None:
        """Remove what was not put in its place."""
        for kind, file in self._files.items():
            with suppress(OSError):  # a disk that is full fails once more, which changes nothing
                file.close()
            self._paths[kind].unlink(missing_ok=True)


def _batches(documents: Iterator[Kept]) -> Iterator[list[Kept]]:
    batch: list[Kept] = []
    size = 0
    for kept in documents:
        batch.append(kept)
        size += kept.num_bytes
        if size >= BATCH_BYTES or len(batch) == 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenised(batch: list[Kept], tokenizer: Tokenizer, request: Request) -> Iterator[Tokenised]:
    """The ids of each document, by one call of the tokenizer."""
    cuts = [_fim_parts(kept, request) for kept in batch]
    pieces = [
        [(part, True) for part in parts] if parts else pieces_of(kept.document)
        for kept, parts in zip(batch, cuts, strict=True)
    ]
    encoded = iter(tokenizer.encode_batch([text for parts in pieces for text, _ in parts]))
    end = np.array([tokenizer.eos_id], dtype=np.int64)
    for cut, parts in zip(cuts, pieces, strict=True):
        found = [next(encoded) for _ in parts]
        if cut:
            assert tokenizer.fim is not None, "checked before the survey"
            prefix, suffix, middle = found
            ids = np.concatenate([join_parts(prefix, suffix, middle, tokenizer.fim), end])
            yield Tokenised(ids, None, True)
            continue
        ids = np.concatenate([*found, end])
        if len(parts) == 1 and parts[0][1]:
            yield Tokenised(ids, None, False)
            continue
        # The end of a document is a target where the text before it is.
        marks = [*(is_target for _, is_target in parts), parts[-1][1]]
        yield Tokenised(ids, np.repeat(marks, [*map(len, found), 1]), False)


def _fim_parts(kept: Kept, request: Request) -> tuple[str, ...] | None:
    """Prefix, suffix and middle of a document that is rewritten; one with a mask never is."""
    if kept.is_validation or kept.document.spans is not None:
        return None
    return cut_document(kept.document.text, kept.digest, request.seed, request.fim_rate)
