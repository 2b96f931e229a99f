"""Makes a folder of token shards once, and checks that the one at hand is the one asked for.

    survey     every chunk of the source is read and hashed: which documents are kept, which validate
    tokenizer  trained, where it must be
    tokenise   every chunk is read again, and its documents become ids
    assemble   pieces become shards

The first and third are shared out to processes. The folder is built beside its place, and renamed when whole,
so a folder that has a manifest is complete. A lock keeps two preparations of the same folder apart; the
second finds the work done. What a killed preparation leaves is gone on with by the next one that asks for the
same of the same files, and removed by any other.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from moe_runtime.config.data import DataConfig, TextForm
from moe_runtime.data.assemble import assemble
from moe_runtime.data.bpe import train_bpe
from moe_runtime.data.job import PLAN, SURVEY, TOKENISE, Job, plan_digest
from moe_runtime.data.manifest import MANIFEST, Manifest, TokenizerRecord, read_manifest
from moe_runtime.data.pool import WorkerDied, run_chunks
from moe_runtime.data.sources import CHUNK_BYTES, Chunk
from moe_runtime.data.survey import kept_of, merge_surveys
from moe_runtime.data.task import Progress, Request
from moe_runtime.data.tokenise import SPLITS, ids_dtype
from moe_runtime.data.tokenizer import bpe_size, open_tokenizer
from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.data.writer import SHARD_TOKENS, replace_file, write_file
from moe_runtime.errors import DataError

# A BPE learns from this much of the training split, from its beginning; more changes little.
BPE_TRAINING_BYTES = 256 * 1024 * 1024


def silent(what: str, done: int, total: int | None) -> None:
    """A progress display that shows nothing."""


def prepare(
    request: Request,
    out: Path,
    overwrite: bool = False,
    progress: Progress = silent,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Manifest:
    """Tokenise a source into `out`, unless the same request was prepared there already.

    Args:
        out: folder to make; its parents are made too.
        overwrite: replace data that was prepared there, never a folder that holds anything else.
        progress: told of the work as it goes.
        shard_tokens: tokens a shard.
        workers: processes that read and tokenise; None: one for each processor.
        chunk_bytes: of the source, read by one of them at a time.

    Raises:
        DataError: bad source or tokenizer, disk full, or `out` holds something else.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _locked(out):
            if (out / MANIFEST).exists() and not overwrite:
                return _same(read_manifest(out), request, out)
            if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
                raise DataError(f"{out}: exists and holds no prepared data; choose another folder")
            hands = workers or len(os.sched_getaffinity(0))
            return _build(request, out, progress, shard_tokens, hands, chunk_bytes)
    except OSError as error:
        raise _disk_error(error, out) from error


def ensure_prepared(
    config: DataConfig, seed: int, progress: Progress = silent, claims: Collection[str] | None = None
) -> Manifest:
    """The manifest of `config.path`, prepared there first if missing and `config.source` is set.

    Args:
        config: of one set.
        seed: of the run; keys the infill cuts if the data is prepared now.
        claims: keys of the config that must be true of what is there; None: all.

    Raises:
        DataError: nothing there and no source, or what is there was prepared otherwise than the config says.
    """
    assert config.path is not None, "sets of a mixture are prepared one by one"
    out = Path(config.path)
    if config.source is not None and not (out / MANIFEST).exists():
        prepare(_wanted(config, config.source, seed), out, progress=progress)
    manifest = read_manifest(out)
    check_manifest(manifest, config, claims)
    return manifest


def _wanted(config: DataConfig, source: str, seed: int) -> Request:
    return Request(source, config.tokenizer, seed, config.fim_rate, config.validation_fraction, config.form)


def check_manifest(manifest: Manifest, config: DataConfig, claims: Collection[str] | None = None) -> None:
    """Refuse data that was prepared otherwise than the config says; the seed may differ.

    Raises:
        DataError: names the key, both values and what to do.
    """
    source = manifest.source if config.source is None else config.source
    found = _difference(manifest, _wanted(config, source, manifest.seed), claims)
    if found is not None:
        key, got, expected = found
        raise DataError(
            f"data.{key}: config says {expected}, but {config.path} was prepared with {got}; "
            f"set data.{key}={got}, choose another data.path, or prepare it again with "
            "`moe-runtime prepare --force`"
        )


def _same(manifest: Manifest, request: Request, out: Path) -> Manifest:
    found = _difference(manifest, request)
    if found is not None:
        key, got, expected = found
        raise DataError(
            f"{out}: already prepared with {key} {got}, asked for {expected}; "
            "choose another --out or add --force"
        )
    return manifest


def _difference(
    manifest: Manifest, wanted: Request, claims: Collection[str] | None = None
) -> tuple[str, object, object] | None:
    """(key, prepared, wanted) of the first difference; the seed counts only where it was used."""
    pairs: dict[str, tuple[object, object]] = {
        "tokenizer": (manifest.tokenizer.name, wanted.tokenizer),
        "source": (manifest.source, wanted.source),
        "fim_rate": (manifest.fim_rate, wanted.fim_rate),
        "validation_fraction": (manifest.validation_fraction, wanted.validation_fraction),
        "form": (_shown(manifest.form), _shown(wanted.form)),
        "seed": (manifest.seed, wanted.seed if wanted.fim_rate > 0 else manifest.seed),
    }
    for key, (got, expected) in pairs.items():
        if claims is not None and key not in claims:
            continue
        if got != expected and not (key == "tokenizer" and _is_same_file(manifest, wanted.tokenizer)):
            return key, got, expected
    return None


def _is_same_file(manifest: Manifest, name: str) -> bool:
    """True if `name` is a tokenizer file with the content that made the data."""
    if bpe_size(name) is not None or not Path(name).is_file():
        return False
    content = open_tokenizer(name).to_json().encode()
    return hashlib.sha256(content).hexdigest() == manifest.tokenizer.record.sha256


def _shown(form: TextForm) -> str:
    """As it can be given again."""
    return json.dumps(form.model_dump(exclude_defaults=True)).replace('"', "")


def _build(
    request: Request, out: Path, progress: Progress, shard_tokens: int, workers: int, chunk_bytes: int
) -> Manifest:
    """Make the folder under a temporary name, then put it in its place."""
    work = out.parent / f".{out.name}.preparing"
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


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside the folder; the system lets go of it if the process dies."""
    with (out.parent / f".{out.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: OSError, out: Path) -> DataError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{error.filename or out}: {error.strerror or error}; choose another folder for the data"
        )
    free = shutil.disk_usage(out.parent).free / 1e6
    work = out.parent / f".{out.name}.preparing"
    if work.exists():
        return DataError(
            f"{out}: disk full while preparing data ({free:.1f} MB free); free some space and run the same "
            f"command, which goes on where it stopped, or remove {work}"
        )
    return DataError(
        f"{out}: disk full while preparing data ({free:.1f} MB free now that the partial folder "
        "is removed); free some space or choose another folder"
    )
