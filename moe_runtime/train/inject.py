"""Makes faults on purpose, where and when a user wants them; tests and `chaos` use nothing else.

The injector listens to the marks of its rank's own thread, and to the two calls of the thread that writes
checkpoints. Before a fault strikes it is written into `faults.jsonl` in the run folder, and that to the disk.
So a fault strikes once, also over restarts of its rank, and the file is the ground truth against which
detection and attribution are scored.

Nothing here pretends: a killed process is killed by the kernel, the interpreter's lock is really held, and
memory really ends. Only a full disk is told to the writer instead of being made, for a disk is shared.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.parallel.beat import Beat
from moe_runtime.parallel.progress import Progress
from moe_runtime.train.fault import RARE_PHASES, Fault, read_faults

FAULTS_FILE = "faults.jsonl"
_FRESH = "fresh"  # a line of this kind parts two lives of a run folder
_FORWARD_ONLY = ("dispatch", "combine")
_SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}


class InjectedFault(RuntimeError):
    """What the kind `raise` raises."""


class Injector:
    """The faults of one rank.

    Args:
        faults: of all ranks.
        rank: global.
        run_dir: where faults.jsonl is; made if missing.
        fresh: forget the faults that struck this rank before.
        orders: a file of further faults, read again whenever a step begins.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        rank: int,
        run_dir: Path,
        fresh: bool = False,
        orders: Path | None = None,
    ) -> None:
        self._file = run_dir / FAULTS_FILE
        self._progress = Progress()
        self._spoil: Callable[[Fault], object] | None = None
        self._factor = 1.0
        self._worked_s = 0.0  # thread time at the newest mark
        self._rank, self._orders = rank, orders
        self._left: dict[Fault, int] = {}
        if fresh and (faults or orders is not None):
            self._append({"kind": _FRESH, "rank": rank})
        self._add(faults)

    def listen(self, progress: Progress, spoil: Callable[[Fault], object] | None) -> None:
        """Follow a rank's marks.

        Args:
            spoil: called on the rank's own thread with a fault that has a target.
        """
        self._progress, self._spoil = progress, spoil
        if self._left or self._orders is not None:
            progress.listeners.append(self._on_mark)

    def at(self, phase: str) -> None:
        """A phase that has no mark begins: `init`, `save_write`, `save_rename`."""
        self._strike((phase,))

    def left(self) -> list[str]:
        """Faults of this rank that have not struck, as they were written."""
        own = (fault for fault, times in self._left.items() if times > 0 and fault.rank == self._rank)
        return [fault.text for fault in own]

    def _add(self, faults: Sequence[Fault]) -> None:
        """Take up the faults of this rank that are not known, as often as they have not struck yet."""
        mine = (fault for fault in faults if fault.rank == self._rank or fault.is_of_all)
        own = [fault for fault in mine if fault not in self._left]
        lines = read_strikes(self._file) if own else []
        struck = Counter((line["fault"], line["nth"]) for line in lines)
        self._left |= {fault: fault.times - struck[fault.text, fault.nth] for fault in own}

    def _on_mark(self, progress: Progress) -> None:
        if self._orders is not None and progress.phase == "data" and self._orders.exists():
            self._add(read_faults(self._orders.read_text().splitlines()))
        self._lag()
        self._strike(phases_of(progress))
        self._worked_s = time.thread_time()

    def _lag(self) -> None:
        """A slow rank's own work takes longer: processor time, for it stands still while it waits."""
        if self._factor > 1.0:
            time.sleep((self._factor - 1.0) * (time.thread_time() - self._worked_s))

    def _strike(self, phases: tuple[str, ...]) -> None:
        for fault, times in self._left.items():
            if times > 0 and fault.phase in phases and self._is_due(fault, times):
                self._left[fault] -= 1
                if fault.rank == self._rank:
                    self._write_down(fault)
                self._do(fault)

    def _is_due(self, fault: Fault, times: int) -> bool:
        step = self._progress.step
        is_late = fault.phase in RARE_PHASES or times < fault.times
        return step >= fault.step if is_late else step == fault.step

    def _write_down(self, fault: Fault) -> None:
        progress = self._progress
        self._append(
            {
                "kind": fault.kind,
                "rank": fault.rank,
                "step": progress.step,
                "phase": fault.phase,
                "target": fault.target,
                "entry": progress.entry,
                "part": progress.part,
                "fault": fault.text,
                "nth": fault.nth,
                "pid": os.getpid(),
            }
        )

    def _append(self, fields: Mapping[str, Any]) -> None:
        """Add a line to the file, and wait until it is on the disk; ranks do so in no order."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields}
        self._file.parent.parent.mkdir(parents=True, exist_ok=True)
        self._file.parent.mkdir(mode=0o700, exist_ok=True)  # as the run itself would, were it first
        file = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.write(file, json.dumps(line).encode() + b"\n")
            os.fsync(file)
        finally:
            os.close(file)

    def _do(self, fault: Fault) -> None:
        if fault.kind in _SIGNALS:
            os.kill(os.getpid(), _SIGNALS[fault.kind])
        elif fault.kind == "slow":
            self._factor, self._worked_s = fault.value, time.thread_time()
        elif fault.target:
            if self._spoil is None:
                raise InjectedFault(f"{fault.text}: there is nothing to strike yet")
            self._spoil(fault)
        else:
            _DEEDS[fault.kind](fault)


def phases_of(progress: Progress | Beat) -> tuple[str, ...]:
    """The phases of faults that begin with a mark; a part of an overlapped entry has its own direction."""
    if progress.phase != "step":
        return () if progress.entry else (progress.phase,)
    label = progress.part.partition(" ")[0]
    if not label or label == "waits":
        return ("backward",) if "W" in progress.entry else ()
    if label.endswith(("_b", "_w")):
        return ("backward",)
    return ("forward", label) if label in _FORWARD_ONLY else ("forward",)


def read_strikes(file: Path) -> list[dict[str, Any]]:
    """The lines of faults that struck since their rank was last told to begin afresh."""
    found: list[dict[str, Any]] = []
    for line in read_jsonl(file):
        if line["kind"] == _FRESH:
            found = [other for other in found if other["rank"] != line["rank"]]
        else:
            found.append(line)
    return found


def _exit(fault: Fault) -> None:
    os._exit(int(fault.value))


def _raise(fault: Fault) -> None:
    raise InjectedFault(fault.text)


def _sleep(fault: Fault) -> None:
    time.sleep(fault.value)


def _segfault(fault: Fault) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants its memory on the disk
    ctypes.string_at(0)


def _hold_lock(fault: Fault) -> None:
    """Wait for a lock that is never given back, inside C: no other thread of Python runs, nor any handler."""
    libc, mutex = ctypes.PyDLL(None), ctypes.create_string_buffer(128)  # zeros are an open pthread_mutex_t
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def _fill_disk(fault: Fault) -> None:
    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, as was injected")


def _end_memory(fault: Fault) -> None:
    """Leave this process so much memory, and let the rank's own thread ask for more until it is refused."""
    import torch

    left = int(fault.value * 2**20)
    now = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (now + left, resource.getrlimit(resource.RLIMIT_AS)[1]))
    held = [torch.empty(2 * left + 2**20, dtype=torch.uint8) for _ in range(64)]  # some fit what was freed
    sys.exit(f"{len(held)} times more memory than the limit: it was not kept")


_DEEDS: dict[str, Callable[[Fault], None]] = {
    "exit": _exit,
    "raise": _raise,
    "sleep": _sleep,
    "segfault": _segfault,
    "gil": _hold_lock,
    "diskfull": _fill_disk,
    "oom": _end_memory,
}
