"""Makes a folder of token shards once, and checks that the one at hand is the one asked for.

The folder is built beside its place under another name and renamed when whole, so a folder that has
a manifest is complete. A lock keeps two preparations of the same folder apart; the second finds the
work done, and leftovers of a killed one are removed by the next.
"""

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_runtime.config.data import DataConfig
from moe_runtime.data.manifest import MANIFEST, Manifest, read_manifest
from moe_runtime.data.survey import Progress
from moe_runtime.data.tokenise import Request, write_data
from moe_runtime.data.tokenizer import bpe_size, open_tokenizer
from moe_runtime.data.writer import SHARD_TOKENS
from moe_runtime.errors import DataError


def silent(what: str, done: int, total: int | None) -> None:
    """A progress display that shows nothing."""


def prepare(
    request: Request,
    out: Path,
    overwrite: bool = False,
    progress: Progress = silent,
    shard_tokens: int = SHARD_TOKENS,
) -> Manifest:
    """Tokenise a source into `out`, unless the same request was prepared there already.

    Args:
        out: folder to make; its parents are made too.
        overwrite: replace data that was prepared there, never a folder that holds anything else.
        progress: told of the work as it goes.
        shard_tokens: tokens a shard.

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
            return _build(request, out, progress, shard_tokens)
    except OSError as error:
        raise _disk_error(error, out) from error


def ensure_prepared(config: DataConfig, seed: int, progress: Progress = silent) -> Manifest:
    """The manifest of `config.path`, prepared there first if missing and `config.source` is set.

    Args:
        seed: of the run; keys the infill cuts if the data is prepared now.

    Raises:
        DataError: nothing there and no source, or what is there was prepared otherwise than the config says.
    """
    out = Path(config.path)
    if config.source is not None and not (out / MANIFEST).exists():
        rates = {"fim_rate": config.fim_rate, "validation_fraction": config.validation_fraction}
        prepare(Request(config.source, config.tokenizer, seed, **rates), out, progress=progress)
    manifest = read_manifest(out)
    check_manifest(manifest, config)
    return manifest


def check_manifest(manifest: Manifest, config: DataConfig) -> None:
    """Refuse data that was prepared otherwise than the config says; the seed may differ.

    Raises:
        DataError: names the key, both values and what to do.
    """
    source = manifest.source if config.source is None else config.source
    rates = {"fim_rate": config.fim_rate, "validation_fraction": config.validation_fraction}
    found = _difference(manifest, Request(source, config.tokenizer, manifest.seed, **rates))
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


def _difference(manifest: Manifest, wanted: Request) -> tuple[str, object, object] | None:
    """(key, prepared, wanted) of the first difference; the seed counts only where it was used."""
    pairs: dict[str, tuple[object, object]] = {
        "tokenizer": (manifest.tokenizer.name, wanted.tokenizer),
        "source": (manifest.source, wanted.source),
        "fim_rate": (manifest.fim_rate, wanted.fim_rate),
        "validation_fraction": (manifest.validation_fraction, wanted.validation_fraction),
        "seed": (manifest.seed, wanted.seed if wanted.fim_rate > 0 else manifest.seed),
    }
    for key, (got, expected) in pairs.items():
        if got != expected and not (key == "tokenizer" and _is_same_file(manifest, wanted.tokenizer)):
            return key, got, expected
    return None


def _is_same_file(manifest: Manifest, name: str) -> bool:
    """True if `name` is a tokenizer file with the content that made the data."""
    if bpe_size(name) is not None or not Path(name).is_file():
        return False
    content = open_tokenizer(name).to_json().encode()
    return hashlib.sha256(content).hexdigest() == manifest.tokenizer.record.sha256


def _build(request: Request, out: Path, progress: Progress, shard_tokens: int) -> Manifest:
    """Make the folder under a temporary name, then put it in its place."""
    prefix = f".{out.name}.preparing-"
    for leftover in out.parent.glob(f"{prefix}*"):
        shutil.rmtree(leftover)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    try:
        fresh = work / "new"
        fresh.mkdir()
        manifest = write_data(request, fresh, progress, shard_tokens)
        _sync_folder(fresh)
        if out.exists():
            out.rename(work / "old")
        fresh.rename(out)
        _sync_folder(out.parent)
        return manifest
    finally:
        shutil.rmtree(work, ignore_errors=True)


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
    free = shutil.disk_usage(out.parent).free
    return DataError(
        f"{out}: disk full while preparing data ({free / 1e6:.1f} MB free now that the partial folder "
        "is removed); free some space or choose another folder"
    )
