"""Makes a folder of token shards once, and checks that the one at hand is the one asked for.

A lock keeps two preparations of the same folder apart; the second finds the work done. How the folder is made
is in `passes`.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from moe_runtime.config.data import DataConfig, TextForm
from moe_runtime.data.manifest import MANIFEST, Manifest, read_manifest
from moe_runtime.data.passes import build_folder, work_folder
from moe_runtime.data.sources import CHUNK_BYTES
from moe_runtime.data.task import Progress, Request
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
            return build_folder(request, out, progress, shard_tokens, hands, chunk_bytes)
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
        if key == "source" and _place_of(manifest.source) == _place_of(wanted.source):
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


def _place_of(source: str) -> str:
    """A source with its path made absolute, so that one file has one name wherever it is named from."""
    kind, mark, path = source.partition(":")
    if mark and kind in ("dir", "glob"):
        return f"{kind}:{os.path.abspath(path)}"
    return source if source.startswith("builtin:") else os.path.abspath(source)


def _shown(form: TextForm) -> str:
    """As it can be given again."""
    return json.dumps(form.model_dump(exclude_defaults=True)).replace('"', "")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold `.NAME.lock` beside the folder; the system lets go of it if the process dies.

    The file is removed in the end. Whoever waited for it then holds a file that nobody else can find, so
    they look whether it is still there, and begin again.
    """
    path = out.parent / f".{out.name}.lock"
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(path, file.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _disk_error(error: OSError, out: Path) -> DataError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return DataError(
            f"{error.filename or out}: {error.strerror or error}; choose another folder for the data"
        )
    free = shutil.disk_usage(out.parent).free / 1e6
    work = work_folder(out)
    if work.exists():
        return DataError(
            f"{out}: disk full while preparing data ({free:.1f} MB free); free some space and run the same "
            f"command, which goes on where it stopped, or remove {work}"
        )
    return DataError(
        f"{out}: disk full while preparing data ({free:.1f} MB free now that the partial folder "
        "is removed); free some space or choose another folder"
    )
