"""Where a rank's words go: rank 0 speaks to the user, each other rank into a file of the run folder.

A hundred ranks that speak at once say nothing. So the descriptors of standard output and error of every rank
but the first are turned to `RUN_DIR/logs/rankN.log` before torch is imported: whatever speaks in the process,
be it Python, NCCL, a child process or the last words of an abort, goes there, under each launcher alike. The
files of launchers (torchrun's `--redirects`, srun's `-o`) were rejected as the way to do it: each has others,
and none knows which folder is the run's.

What a user must read is written to both: `tell_user` is for the error that ends a rank.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moe_runtime.errors import ConfigError
from moe_runtime.train.run_lock import make_run_dir

LOGS_DIR = "logs"
_HEAD = "--- "  # of the line that begins the part of a process
_TAIL_BYTES = 1 << 14


@dataclass(frozen=True)
class _Turned:
    """The output of this process, turned to a file.

    Args:
        console: descriptor of what standard error was.
        path: of the file.
        old_size, own_size: its bytes before this process, and after the line that begins its part.
    """

    console: int
    path: Path
    old_size: int
    own_size: int


_turned: _Turned | None = None  # descriptors belong to a process, and so does what became of them


def log_path(run_dir: Path, rank: int) -> Path:
    """The file that a rank speaks into."""
    return run_dir / LOGS_DIR / f"rank{rank}.log"


def read_ranks(text: str | None, world_size: int) -> frozenset[int]:
    """Ranks of `--log-ranks`: `all`, or numbers and ranges, `1,4-7`.

    Raises:
        ConfigError: it is none of these, or names a rank that there is not.
    """
    if text is None:
        return frozenset()
    if text == "all":
        return frozenset(range(world_size))
    ranks: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise ConfigError(f"--log-ranks: expected all, or ranks such as 1,4-7, got {text!r}")
        ranks |= set(range(int(first), int(last or first) + 1))
    if ranks and max(ranks) >= world_size:
        raise ConfigError(f"--log-ranks: expected ranks from 0 to {world_size - 1}, got {max(ranks)}")
    return frozenset(ranks)


def turn_to_file(run_dir: Path, rank: int, head: str, *, private: bool, fresh: bool, shown: bool) -> None:
    """Let this rank speak into its file from here on; if that cannot be written, it goes on as it is.

    Args:
        head: what the part of this process begins with, beside the time.
        private: a run folder that is made now can be entered by its owner alone.
        fresh: forget what is in the file.
        shown: the user wants to read this rank's words on the console as well.
    """
    global _turned
    path = log_path(run_dir, rank)
    try:
        make_run_dir(run_dir, private)
        path.parent.mkdir(exist_ok=True)
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | (os.O_TRUNC if fresh else 0)
        file = os.open(path, mode, 0o644)
        old_size = os.fstat(file).st_size
        time = datetime.now(UTC).isoformat(timespec="seconds")
        own_size = old_size + os.write(file, f"{_HEAD}{time} rank {rank}, {head}\n".encode())
    except OSError:  # rank 0 finds it too, and says so
        return
    sys.stdout.flush()
    sys.stderr.flush()
    console = os.dup(2)
    target = _tee(rank, file) if shown else file
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    _turned = _Turned(console, path, old_size, own_size)


def last_words(run_dir: Path, rank: int) -> str:
    """The last line that a rank's newest process has said into its file; empty: nothing."""
    try:
        with log_path(run_dir, rank).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    said = [line for line in lines if line.strip()]
    return "" if not said or said[-1].startswith(_HEAD) else said[-1].strip()


def tell_user(text: str) -> None:
    """A line for the user on the console, and in this rank's file if it has one."""
    print(text, file=sys.stderr, flush=True)
    if _turned is not None:
        os.write(_turned.console, text.encode(errors="backslashreplace") + b"\n")


def note(text: str) -> None:
    """A line for this rank's file, if it has one."""
    if _turned is not None:
        print(text, file=sys.stderr, flush=True)


def leave_no_trace() -> None:
    """Take the file away again, and the folders that were made for it, unless something was said.

    For a run that was refused: nothing of it should be left.
    """
    if _turned is None:
        return
    sys.stdout.flush()
    try:
        if _turned.path.stat().st_size != _turned.own_size:
            return
        os.truncate(_turned.path, _turned.old_size)
        if _turned.old_size == 0:
            _turned.path.unlink()
            _turned.path.parent.rmdir()
            _turned.path.parent.parent.rmdir()
    except OSError:  # not empty: other ranks' files, or an older run
        return


def _tee(rank: int, file: int) -> int:
    """A descriptor whose text goes to the file and, with the rank's name, to the console.

    A process of its own does it, which ends when nobody can write to it any more: it has the last words of a
    rank that was killed as well.
    """
    reading, writing = os.pipe()
    subprocess.Popen(
        [sys.executable, "-m", "moe_runtime.cli.rank_tee", str(rank)],
        stdin=reading,
        stdout=file,
        start_new_session=True,
    )
    os.close(reading)
    os.close(file)
    return writing
