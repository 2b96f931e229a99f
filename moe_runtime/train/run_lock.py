"""One run folder, one run: two at once would tear each other's records and checkpoints."""

import errno
import fcntl
import os
from pathlib import Path
from typing import TextIO

from moe_runtime.errors import ConfigError

LOCK_FILE = ".lock"


def enter_run(run_dir: Path, private: bool = True) -> TextIO | None:
    """Make the run folder and lock it, as `lock_run` does.

    Args:
        private: a folder that is made now can be entered by its owner alone.

    Raises:
        ConfigError: it cannot be written, or another process holds it.
    """
    try:
        make_run_dir(run_dir, private)
        return lock_run(run_dir)
    except OSError as error:
        text = f"out_dir: {run_dir} cannot be written ({error.strerror}); choose another"
        raise ConfigError(text) from error


def make_run_dir(run_dir: Path, private: bool) -> None:
    """Make the run folder unless it is there.

    Raises:
        OSError: it cannot be made.
    """
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    run_dir.mkdir(mode=0o700 if private else 0o777, exist_ok=True)


def lock_run(run_dir: Path) -> TextIO | None:
    """Hold the folder for this process until it ends, however it ends.

    Returns:
        The open lock file, to be kept; None on a file system that has no locks.

    Raises:
        ConfigError: another process holds it.
    """
    lock = (run_dir / LOCK_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            lock.close()
            return None
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        text = f"{run_dir}: process {holder} is training in this folder; wait for its end, or set name"
        raise ConfigError(text) from error
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {os.uname().nodename}\n")
    lock.flush()
    return lock


def is_in_use(run_dir: Path) -> bool:
    """Whether a process holds the folder; False where that cannot be known."""
    try:
        with (run_dir / LOCK_FILE).open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EWOULDBLOCK, errno.EACCES)
    return False
