"""Tells whoever supervises a rank that it lives, where its own thread is, and its stacks if they are wanted.

    rank{R}.heartbeat   see `beat.py`
    rank{R}.stacks      appended at SIGUSR1 and at a crash: what every thread of Python is in
    rank{R}.flight      written once a file `dump` is there: the newest collectives of every process group

The stacks are written by a signal handler in C. So they come also from a process whose interpreter is locked,
which is one of the states that one wants them for. Starts before torch is imported, and imports nothing.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from moe_runtime.parallel.beat import BeatFile
from moe_runtime.parallel.progress import Progress

STATUS_DIR = "MOE_RUNTIME_STATUS_DIR"  # environment: the folder of a rank's supervisor, if it has one
ATTEMPT = "MOE_RUNTIME_ATTEMPT"  # environment: its number of this start of the ranks, from 1
DUMP_FILE = "dump"
_FLIGHT_ENTRIES = "2000"


class Heartbeat:
    """Beats while the context is open; use it on the rank's own thread.

    Args:
        folder: of the files; shared by the ranks of this machine.
        rank: global.
        every_s: seconds between beats.

    Raises:
        OSError: the files cannot be made.
    """

    def __init__(self, folder: Path, rank: int, every_s: float) -> None:
        self._folder, self._rank, self._every_s = folder, rank, every_s
        self._file = BeatFile(folder / f"rank{rank}.heartbeat")
        self._stacks: IO[str] = (folder / f"rank{rank}.stacks").open("a")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _FLIGHT_ENTRIES)  # before there is a process group

    def __enter__(self) -> Self:
        faulthandler.enable(self._stacks)
        faulthandler.register(signal.SIGUSR1, self._stacks, all_threads=True)
        self._file.marks(Progress(), time.monotonic())
        self._file.beats(time.monotonic())
        self._thread.start()
        own, beats = threading.get_native_id(), self._thread.native_id or 0
        self._file.opens(os.getpid(), threading.get_ident(), (own, beats))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Signals stay taken care of: the supervisor may ask until this process is gone.
        self._ended.set()
        self._thread.join()

    def follow(self, progress: Progress) -> None:
        """Pass every mark on; before other listeners, which may end the process."""
        self._on_mark(progress)
        progress.listeners.insert(0, self._on_mark)

    def writes(self, point: str) -> None:
        """Pass on the point that a checkpoint is at, which another thread writes; empty: it is done."""
        self._file.writes(point)

    def _on_mark(self, progress: Progress) -> None:
        self._file.marks(progress, time.monotonic())

    def _beat(self) -> None:
        has_dumped = False
        while not self._ended.wait(self._every_s):
            self._file.beats(time.monotonic())
            if not has_dumped and (self._folder / DUMP_FILE).exists():
                has_dumped = True
                self._dump_flight()

    def _dump_flight(self) -> None:
        """The flight recorder's entries, as JSON; nothing where torch is not there yet or has none."""
        torch = sys.modules.get("torch")
        dump = getattr(getattr(torch, "_C", None), "_distributed_c10d", None)
        dump = getattr(dump, "_dump_fr_trace_json", None)
        if dump is None:
            return
        fresh = self._folder / f"rank{self._rank}.flight.part"
        fresh.write_bytes(dump())
        fresh.rename(self._folder / f"rank{self._rank}.flight")
