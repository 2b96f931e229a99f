"""Equal shares of the processor for rank processes, by control groups.

With more ranks than cores a rank that waits would lend its core to another, and what a schedule gains
would not show. Confined to its share, a rank that waits lends nothing, as on machines of their own.

The period is short, so that a rank that has used up its share stands still for milliseconds only.
A group is named after the process that made it; groups whose maker is dead are removed by the next one.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from moe_runtime.errors import ConfigError

_PREFIX = "moe-bench"
_PERIOD_US = 4_000
_LEAST_US = 1_000  # the kernel refuses less
_PATIENCE_S = 5.0


@contextmanager
def open_shares(count: int, cores: float) -> Iterator[list[Path]]:
    """Groups of one share each, for `join_share`; removed after the context, when nobody is in them.

    Args:
        count: how many.
        cores: of each, such as 0.5.

    Raises:
        ConfigError: control groups are not there, or may not be written.
    """
    root = _processor_root()
    made: list[Path] = []
    try:
        _remove_forgotten(root)
        for number in range(count):
            folder = root / f"{_PREFIX}-{os.getpid()}-{number}"
            folder.mkdir()
            made.append(folder)
            _limit(folder, max(_LEAST_US, round(cores * _PERIOD_US)))
        yield made
    except OSError as error:
        text = f"bench: cannot give out shares of the processor ({error.filename}: {error.strerror})"
        raise ConfigError(f"{text}; run as root, or measure with --no-quota") from error
    finally:
        for folder in made:
            _remove(folder)


def join_share(folder: Path) -> None:
    """Confine this process, all of its threads, to a share."""
    (folder / "cgroup.procs").write_text(str(os.getpid()))


def _processor_root() -> Path:
    """Where groups that limit the processor are made: version 1 if it has the controller, else version 2."""
    unified = None
    for partition in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = partition.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            return Path(place)
        if kind == "cgroup2" and "cpu" in (Path(place) / "cgroup.controllers").read_text().split():
            unified = Path(place)
    if unified is None:
        raise ConfigError("bench: no control groups limit the processor here; measure with --no-quota")
    return unified


def _limit(folder: Path, quota_us: int) -> None:
    if (folder / "cpu.cfs_quota_us").exists():
        (folder / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (folder / "cpu.cfs_quota_us").write_text(str(quota_us))
        return
    if not (folder / "cpu.max").exists():
        (folder.parent / "cgroup.subtree_control").write_text("+cpu")
    (folder / "cpu.max").write_text(f"{quota_us} {_PERIOD_US}")


def _remove_forgotten(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}-*-*"):
        maker = int(folder.name.split("-")[2])
        if not psutil.pid_exists(maker):
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a group; the kernel lets go of processes that have been killed a moment after their end."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            folder.rmdir()
        except OSError:
            if not folder.exists() or time.monotonic() > deadline:
                return
            time.sleep(0.02)
        else:
            return
