"""Documents to ids to files: fills an empty folder with shards, index, tokenizer and manifest."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe_runtime.data.bpe import train_bpe
from moe_runtime.data.fim import cut_document, join_parts
from moe_runtime.data.manifest import MANIFEST, Manifest, SplitRecord, TokenizerRecord
from moe_runtime.data.sources import Source, open_source
from moe_runtime.data.survey import Kept, Progress, Survey, take_survey
from moe_runtime.data.tokenizer import bpe_size, open_tokenizer
from moe_runtime.data.vocabulary import Ids, Tokenizer
from moe_runtime.data.writer import SplitWriter, write_file
from moe_runtime.errors import DataError

# Texts go to the tokenizer in batches of about this size, which it spreads over the cores.
BATCH_BYTES = 4 * 1024 * 1024
# A BPE learns from this much of the training split, from its beginning; more changes little.
BPE_TRAINING_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Request:
    """What is to be prepared, spelled as in the config.

    Args:
        source: builtin:stdlib, dir:PATH, or a .txt, .jsonl or .parquet file.
        tokenizer: byte, bpe:N, deepseek, or the path of a tokenizer.json.
        seed: keys which training documents are rewritten and where they are cut.
        fim_rate: share of training documents rewritten prefix-suffix-middle, 0..1.
        validation_fraction: share of documents in the validation split.
    """

    source: str
    tokenizer: str = "byte"
    seed: int = 1234
    fim_rate: float = 0.0
    validation_fraction: float = 0.05


def write_data(request: Request, folder: Path, progress: Progress, shard_tokens: int) -> Manifest:
    """Fill an empty folder; the manifest comes last.

    Raises:
        DataError: the source or the tokenizer is not usable.
        OSError: the disk is.
    """
    source = open_source(request.source)
    tokenizer = None if bpe_size(request.tokenizer) else open_tokenizer(request.tokenizer)
    _check_marks(tokenizer, request)
    survey = take_survey(source, request.validation_fraction, progress)
    if tokenizer is None:
        tokenizer = _trained(source, survey, request, progress)
    record = write_file(folder / "tokenizer.json", tokenizer.to_json().encode())
    dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
    train, validation = _write_splits(
        source, survey, tokenizer, request, folder, dtype, progress, shard_tokens
    )
    manifest = Manifest(
        dtype=dtype,
        tokenizer=TokenizerRecord(
            name=request.tokenizer, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, record=record
        ),
        source=request.source,
        licence=source.licence,
        seed=request.seed,
        fim_rate=request.fim_rate,
        validation_fraction=request.validation_fraction,
        counts=survey.counts,
        splits={"train": train, "validation": validation},
    )
    write_file(folder / MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode())
    return manifest


def _check_marks(tokenizer: Tokenizer | None, request: Request) -> None:
    if tokenizer is not None and tokenizer.fim is None and request.fim_rate > 0:
        raise DataError(
            f"tokenizer {request.tokenizer!r}: has no infill tokens, which fim_rate {request.fim_rate} "
            "needs; set fim_rate to 0 or take another tokenizer"
        )


def _trained(source: Source, survey: Survey, request: Request, progress: Progress) -> Tokenizer:
    """A BPE learnt from the training split."""
    size = bpe_size(request.tokenizer)
    assert size is not None, f"{request.tokenizer} needs no training"
    return train_bpe(_training_texts(source, survey, progress), size)


def _training_texts(source: Source, survey: Survey, progress: Progress) -> Iterator[str]:
    total = min(survey.num_bytes, BPE_TRAINING_BYTES)
    done = 0
    for document in survey.kept(source):
        if done >= BPE_TRAINING_BYTES:
            return
        if not document.is_validation:
            yield document.text
        done += document.num_bytes
        progress("training the tokenizer", min(done, total), total)


def _write_splits(
    source: Source,
    survey: Survey,
    tokenizer: Tokenizer,
    request: Request,
    folder: Path,
    dtype: str,
    progress: Progress,
    shard_tokens: int,
) -> tuple[SplitRecord, SplitRecord]:
    """Tokenise every kept document into its split."""
    done = 0
    with (
        SplitWriter(folder, "train", dtype, shard_tokens) as train,
        SplitWriter(folder, "validation", dtype, shard_tokens) as validation,
    ):
        for batch in _batches(survey.kept(source)):
            for document, (ids, is_fim) in zip(batch, _tokenised(batch, tokenizer, request), strict=True):
                writer = validation if document.is_validation else train
                writer.add(ids, document.num_bytes, is_fim, document.part)
                done += document.num_bytes
            progress("tokenising", done, survey.num_bytes)
        return train.close(), validation.close()


def _batches(documents: Iterator[Kept]) -> Iterator[list[Kept]]:
    batch: list[Kept] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= BATCH_BYTES or len(batch) == 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenised(batch: list[Kept], tokenizer: Tokenizer, request: Request) -> Iterator[tuple[Ids, bool]]:
    """(ids with the end of the document, was it rewritten) of each document, one call of the tokenizer."""
    cuts = [_parts(document, request) for document in batch]
    encoded = iter(tokenizer.encode_batch([part for parts in cuts for part in parts]))
    end = np.array([tokenizer.eos_id], dtype=np.int64)
    for parts in cuts:
        pieces = [next(encoded) for _ in parts]
        if len(pieces) == 1:
            yield np.concatenate([pieces[0], end]), False
            continue
        assert tokenizer.fim is not None, "checked before the survey"
        yield np.concatenate([join_parts(pieces[0], pieces[1], pieces[2], tokenizer.fim), end]), True


def _parts(document: Kept, request: Request) -> tuple[str, ...]:
    """The whole text, or prefix, suffix and middle."""
    if document.is_validation:
        return (document.text,)
    return cut_document(document.text, document.digest, request.seed, request.fim_rate) or (document.text,)
