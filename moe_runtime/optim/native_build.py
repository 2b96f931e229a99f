"""Compile a C++ source of this package once for a machine, and load it.

The library lands in the user's cache folder under a name that is a hash of everything it depends on:
source, flags, compiler and processor, since it is built for the very processor it runs on and home folders
are shared between machines. Ranks that start together take turns at a lock; the first builds, the others
find the file. It is written beside its place and renamed, so that a file found is a whole one even where
locks do not work. A cache folder that cannot be written to is replaced by one of the process's own.

Rejected: building in the wheel (no wheel for one processor fits another, and the widest vectors are the
point), and torch's JIT extensions (they compile against all of torch's headers, a minute for what takes
three seconds, need ninja, and wait for a lock file that a killed process leaves behind).
"""

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-pthread",
    "-ffp-contract=off",
    # These two change no value: they say that nobody reads errno or the flags of exceptions.
    "-fno-math-errno",
    "-fno-trapping-math",
)
_TIMEOUT_S = 120


class BuildError(Exception):
    """No library; the message is a reason in a few words."""


def load_library(source: Path) -> ctypes.CDLL:
    """The compiled form of `source`, built if it is not in the cache.

    Raises:
        BuildError: no compiler, or it failed, or the result cannot be loaded.
    """
    compiler = _compiler()
    flags = (*FLAGS, *_wide_vectors())
    name = f"{source.stem}-{_fingerprint(source, compiler, flags)}.so"
    folder = _cache_folder()
    library = folder / name
    try:
        if not library.exists():
            with _turn(folder / f"{source.stem}.lock"):
                if not library.exists():
                    _build(source, compiler, flags, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be built or loaded ({error})") from error


def _compiler() -> str:
    for name in (os.environ.get("CXX", ""), *COMPILERS):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise BuildError(f"no C++ compiler is installed (looked for $CXX, {', '.join(COMPILERS)})")


def _wide_vectors() -> tuple[str, ...]:
    """On x86, compilers keep to 256 bits for the clock's sake; a step is better off with 512."""
    return ("-mprefer-vector-width=512",) if platform.machine() in ("x86_64", "AMD64") else ()


def _fingerprint(source: Path, compiler: str, flags: tuple[str, ...]) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S)
    parts = (source.read_text(), " ".join(flags), compiler, version.stdout, platform.machine(), _processor())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """What -march=native looks at: model and instruction sets, as the kernel lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    keys = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU implementer", "CPU part")
    # Of the first processor alone: up to the empty line after it.
    first = lines[: lines.index("")] if "" in lines else lines
    return "\n".join(line for line in first if line.split("\t")[0].strip() in keys)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(root) / "moe_runtime"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid()
    except OSError:
        is_ours = False
    return folder if is_ours else Path(tempfile.mkdtemp(prefix="moe_runtime-"))


@contextmanager
def _turn(lock: Path) -> Iterator[None]:
    """Hold `lock` among the processes of this machine, where its file system can."""
    with lock.open("w") as file:
        # Where the file system has no locks, each builds its own, and the last to rename wins.
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(source: Path, compiler: str, flags: tuple[str, ...], library: Path) -> None:
    handle, made = tempfile.mkstemp(dir=library.parent, suffix=".so")
    os.close(handle)
    try:
        command = [compiler, *flags, str(source), "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise BuildError(f"{compiler} failed: {lines[0]}")
        os.replace(made, library)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{compiler} took more than {_TIMEOUT_S} s") from error
    finally:
        Path(made).unlink(missing_ok=True)
