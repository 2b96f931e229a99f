"""The passes of a preparation: from a source to a folder in its place.

    survey     every chunk of the source is read and hashed: which documents are kept, which validate
    tokenizer  trained, where it must be
    tokenise   every chunk is read again, and its documents become ids
    assemble   pieces become shards

The first and third are shared out to processes. The folder is built beside its place, and renamed when whole,
so a folder that has a manifest is complete. What a killed preparation leaves is gone on with by the next one
that asks for the same of the same files, and removed by any other.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_runtime.data.assemble import assemble
from moe_runtime.data.bpe import train_bpe
from moe_runtime.data.job import PLAN, SURVEY, TOKENISE, Job, plan_digest
from moe_runtime.data.manifest import MANIFEST, Manifest, TokenizerRecord
from moe_runtime.data.pool import WorkerDied, run_chunks
from moe_runtime.data.sources import Chunk
from moe_runtime.data.survey import kept_of, merge_surveys
from moe_runtime.data.task import Progress, Request
from moe_runtime.data.tokenise import SPLITS, ids_dtype
from moe_runtime.data.tokenizer import bpe_size, open_tokenizer
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.data.writer import replace_file, write_file
from moe_runtime.errors import DataError

# A BPE learns from this much of the training split, from its beginning; more changes little.
BPE_TRAINING_BYTES = 256 * 1024 * 1024


def work_folder(out: Path) -> Path:
    """Where a preparation of `out` keeps what it has done."""
    return out.parent / f".{out.name}.preparing"


def build_folder(
    request: Request, out: Path, progress: Progress, shard_tokens: int, workers: int, chunk_bytes: int
) -> Manifest:
    """Make the folder under a temporary name, then put it in its place."""
    work = work_folder(out)
    for leftover in out.parent.glob(f"{work.name}-*"):
        shutil.rmtree(leftover)
    job, keeps = Job(request, work), False
    tokenizer = None if bpe_size(request.tokenizer) else open_tokenizer(request.tokenizer)
    _check_marks(tokenizer, request)
    chunks = job.source.chunks(chunk_bytes)
    _enter(job, plan_digest(request, chunks))
    try:
        manifest = _fill(job, chunks, tokenizer, progress, shard_tokens, workers)
        fresh = work / "new"
        _sync_folder(fresh)
        if out.exists():
            out.rename(work / "old")
        fresh.rename(out)
        _sync_folder(out.parent)
        return manifest
    except (DataError, OSError) as error:
        # What took long is kept for another try, unless the source itself is at fault.
        is_of_source = isinstance(error, DataError) and not isinstance(error, WorkerDied)
        keeps = len(chunks) > 1 and any(job.pieces.glob("*.json")) and not is_of_source
        raise
    except BaseException:
        keeps = True  # asked to end: the next one goes on
        raise
    finally:
        if not keeps:
            shutil.rmtree(work, ignore_errors=True)


def _enter(job: Job, digest: str) -> None:
    """Go on with what lies in the work folder if it is of the same plan; else begin anew."""
    plan = job.work / PLAN
    if not plan.is_file() or plan.read_text() != digest:
        shutil.rmtree(job.work, ignore_errors=True)
        for folder in (job.surveys, job.pieces):
            folder.mkdir(parents=True)
        plan.write_text(digest)
    shutil.rmtree(job.work / "new", ignore_errors=True)
    (job.work / "new").mkdir()


def _fill(
    job: Job,
    chunks: list[Chunk],
    tokenizer: Tokenizer | None,
    progress: Progress,
    shard_tokens: int,
    workers: int,
) -> Manifest:
    """All passes in order; gives the manifest, which is written last."""
    request, folder = job.request, job.work / "new"
    _pass(job, SURVEY, chunks, workers, progress)
    survey = merge_surveys(job.source, len(chunks), job.surveys, request.validation_fraction)
    job = replace(job, survey=survey)
    if tokenizer is None:
        tokenizer = _trained(job, chunks, progress)
    content = tokenizer.to_json().encode()
    replace_file(job.work / "tokenizer.json", content)
    _pass(job, TOKENISE, chunks, workers, progress)
    record = write_file(folder / "tokenizer.json", content)
    dtype = ids_dtype(tokenizer)
    splits = {
        split: assemble(job.pieces, len(chunks), split, folder, dtype, shard_tokens, lambda done: None)
        for split in SPLITS
    }
    manifest = Manifest(
        dtype=dtype,
        tokenizer=TokenizerRecord(
            name=request.tokenizer, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id, record=record
        ),
        source=request.source,
        licence=job.source.licence,
        seed=request.seed,
        fim_rate=request.fim_rate,
        validation_fraction=request.validation_fraction,
        form=request.form,
        counts=survey.counts,
        splits=splits,
    )
    write_file(folder / MANIFEST, json.dumps(manifest.model_dump(), indent=1).encode())
    return manifest


def _pass(job: Job, what: str, chunks: list[Chunk], workers: int, progress: Progress) -> None:
    """Do what is missing of one pass."""
    total = sum(part.num_bytes for chunk in chunks for part in chunk)
    missing = [(index, chunk) for index, chunk in enumerate(chunks) if not job.is_done(what, index)]
    done = total - sum(part.num_bytes for _, chunk in missing for part in chunk)

    def tell(more: int) -> None:
        nonlocal done
        done += more
        progress(what, done, total)

    tell(0)
    run_chunks(job, what, missing, workers, tell)


def _check_marks(tokenizer: Tokenizer | None, request: Request) -> None:
    if tokenizer is not None and tokenizer.fim is None and request.fim_rate > 0:
        raise DataError(
            f"tokenizer {request.tokenizer!r}: has no infill tokens, which fim_rate {request.fim_rate} "
            "needs; set fim_rate to 0 or take another tokenizer"
        )


def _trained(job: Job, chunks: list[Chunk], progress: Progress) -> Tokenizer:
    """A BPE learnt from the training split, or the one that was before this preparation was killed."""
    if (job.work / "tokenizer.json").is_file():
        return job.tokenizer
    size = bpe_size(job.request.tokenizer)
    assert size is not None, f"{job.request.tokenizer} needs no training"
    return train_bpe(_training_texts(job, chunks, progress), size)


def _training_texts(job: Job, chunks: list[Chunk], progress: Progress) -> Iterator[str]:
    assert job.survey is not None, "the survey comes first"
    total = min(job.survey.num_bytes, BPE_TRAINING_BYTES)
    done = 0
    for index, chunk in enumerate(chunks):
        for kept in kept_of(job.source, chunk, index, job.survey, Counter()):
            if done >= BPE_TRAINING_BYTES:
                return
            if not kept.is_validation:
                yield kept.document.text
            done += kept.num_bytes
            progress("training the tokenizer", min(done, total), total)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
