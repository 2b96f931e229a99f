"""Cores, memory, disk, shared memory, open files and the clock of this machine."""

import ctypes
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from moe_runtime.cli.doctor.finding import Finding, ok

_GB = 1e9
_LEAST_MEMORY = 2 * _GB  # four ranks of the quickstart, with torch in each
_LEAST_DISK, _GOOD_DISK = 0.5 * _GB, 5 * _GB
_GOOD_SHM, _SHM_OF_NCCL = 0.06 * _GB, 1 * _GB  # what a container has if nobody asks, and what GPUs need
_GOOD_FILES = 4096
_UNSYNCHRONISED = 0x0040  # STA_UNSYNC of <sys/timex.h>


def look() -> Iterator[Finding]:
    """Findings about the machine."""
    yield _cores()
    yield _memory()
    yield _shared_memory(Path("/dev/shm"), Path("/dev/nvidia0").exists())
    yield _disk("disk", Path.cwd())
    yield _temporary_files()
    yield _open_files()
    yield _clock(Path(__file__).stat().st_mtime)


def _cores() -> Finding:
    cores, quota = len(os.sched_getaffinity(0)), _quota(Path("/sys/fs/cgroup/cpu.max"))
    if quota is not None and quota < cores:
        said = f"{cores} cores, of whose time a quota leaves {quota:.1f}: threads would wait for each other"
        return Finding("cores", "warn", said, f"export OMP_NUM_THREADS={max(1, int(quota))}")
    return ok("cores", f"{cores} of {os.cpu_count()}")


def _quota(file: Path) -> float | None:
    """Cores' worth of time that a control group grants; None: no limit."""
    try:
        share, period = file.read_text().split()
    except (OSError, ValueError):
        return None
    return None if share == "max" else int(share) / int(period)


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    said = f"{memory.available / _GB:.1f} GB free of {memory.total / _GB:.1f} GB"
    if memory.available >= _LEAST_MEMORY:
        return ok("memory", said)
    said = f"expected {_LEAST_MEMORY / _GB:.0f} GB for the quickstart, got {said}"
    return Finding("memory", "warn", said, "ps aux --sort=-rss | head")


def _shared_memory(folder: Path, has_gpu: bool) -> Finding:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        mend = f"mount -t tmpfs -o size=8G tmpfs {folder}"
        return Finding(str(folder), "warn", f"expected shared memory, got: {error.strerror}", mend)
    wanted = _SHM_OF_NCCL if has_gpu else _GOOD_SHM
    said = f"{free / _GB:.2f} GB free"
    if free >= wanted:
        return ok(str(folder), said)
    said = f"expected {wanted / _GB:g} GB for what ranks of a machine share, got {said}"
    return Finding(str(folder), "warn", said, f"mount -o remount,size=8G {folder}")


def _disk(name: str, folder: Path) -> Finding:
    if not os.access(folder, os.W_OK):
        return Finding(name, "fail", f"{folder}: expected to write here, got no right to", "cd ~")
    free = shutil.disk_usage(folder).free
    said = f"{free / _GB:.1f} GB free in {folder}"
    if free >= _GOOD_DISK:
        return ok(name, said)
    state, wanted = ("fail", _LEAST_DISK) if free < _LEAST_DISK else ("warn", _GOOD_DISK)
    said = f"expected {wanted / _GB:g} GB for checkpoints, got {said}"
    return Finding(name, "fail" if state == "fail" else "warn", said, "du -sh runs/* data/* | sort -h")


def _temporary_files() -> Finding:
    try:
        with tempfile.NamedTemporaryFile() as file:
            return ok("temporary files", str(Path(file.name).parent))
    except OSError as error:
        said = f"expected to write one, got: {error.strerror or error}"
        return Finding("temporary files", "fail", said, "export TMPDIR=$HOME")


def _open_files() -> Finding:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= min(_GOOD_FILES, hard):
        return ok("open files", f"{soft} at a time")
    said = f"expected {_GOOD_FILES} at a time for many ranks and shards, got {soft}"
    return Finding("open files", "warn", said, f"ulimit -n {min(65536, hard)}")


def _clock(newest: float) -> Finding:
    """Against the time of a file that is here, and by what the kernel says of its clock."""
    if time.time() < newest - 60:
        said = f"expected a time after that of this file, got {time.strftime('%Y-%m-%d %H:%M')}"
        return Finding("clock", "fail", f"{said}: make would build nothing, certificates fail", _SET_CLOCK)
    if _is_unsynchronised():
        said = (
            f"{time.strftime('%Y-%m-%d %H:%M %Z')}, set by nobody: logs of several machines would not agree"
        )
        return Finding("clock", "note", said, _SET_CLOCK)
    return ok("clock", time.strftime("%Y-%m-%d %H:%M %Z"))


_SET_CLOCK = "timedatectl set-ntp true"


def _is_unsynchronised() -> bool:
    """Whether the kernel has not heard of a time server; False where it cannot be asked."""
    try:
        adjtimex = ctypes.CDLL(None).adjtimex
    except (OSError, AttributeError):
        return False
    # struct timex: `status` is its fifth word; with `modes` 0 nothing is changed.
    words = (ctypes.c_long * 64)()
    if adjtimex(ctypes.byref(words)) < 0:
        return False
    return bool(words[4] & _UNSYNCHRONISED)
