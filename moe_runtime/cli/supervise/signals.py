"""Signals to the launcher become wishes to its ranks: the first to save and leave, the second to go at once.

Ranks sit in sessions of their own, so the terminal's Ctrl-C does not reach them by itself. The first
signal reaches every rank as SIGTERM; they agree on a step, save, and exit 0. A second one kills them. Signals
that come close together are one wish: a scheduler may tell a whole process group and the launcher as well.

The launcher's main thread may be anywhere inside torch, in a rendezvous that lasts minutes, where no handler
of Python's runs. The interpreter still writes the number of each signal to a pipe at once, and a thread
that reads this pipe does the work. So leaving takes a second at most, whatever the main thread waits for.
"""

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_SAME_WISH_S = 0.5
_LEAVE_S = 1.0


class Wishes:
    """What the user or the scheduler asked for so far.

    Args:
        scratch: folder to remove if this process has to end at once.

    Attributes:
        received: signals, without those that only repeat the first.
    """

    def __init__(self, scratch: Path) -> None:
        self.received: list[int] = []
        self._scratch = scratch
        self._first_s = 0.0

    @property
    def to_stop(self) -> bool:
        """Whether the run is to end."""
        return bool(self.received)

    @property
    def is_preemption(self) -> bool:
        """Whether a scheduler takes the machine away: SIGTERM, not a person's Ctrl-C."""
        return self.received[:1] == [signal.SIGTERM]

    def take(self, number: int) -> None:
        """A signal came; called by the thread of `listening`."""
        now = time.monotonic()
        if self.received and now - self._first_s < _SAME_WISH_S:
            return
        self.received.append(number)
        if len(self.received) > 1:
            _send(psutil.Process().children(), signal.SIGKILL)
            time.sleep(_LEAVE_S)  # in which the main thread says how it ended, unless it cannot
            self._leave(b"")
        self._first_s = now
        if not psutil.Process().children():
            time.sleep(_SAME_WISH_S)  # ranks may be starting
        if not (ranks := psutil.Process().children()):
            self._leave(b"stopped while no rank was running\n")
        _tell(b"stopping after this step; once more to stop at once\n")
        _send(ranks, signal.SIGTERM)  # which ends one that is still starting, without a word

    def _leave(self, text: bytes) -> None:
        shutil.rmtree(self._scratch, ignore_errors=True)
        _tell(text)
        os._exit(130)


@contextmanager
def listening(scratch: Path) -> Iterator[Wishes]:
    """While open, signals to this process are wishes to the ranks."""
    wishes = Wishes(scratch)
    watched, wakes = os.pipe()
    os.set_blocking(wakes, False)
    for number in _SIGNALS:  # for good: after the context this process only says how it ended
        signal.signal(number, lambda *_: None)
    before_fd = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    threading.Thread(target=_read, args=(watched, wishes), daemon=True).start()
    try:
        yield wishes
    finally:
        signal.set_wakeup_fd(before_fd)
        os.close(wakes)  # ends the thread


def _read(watched: int, wishes: Wishes) -> None:
    while number := os.read(watched, 1):
        if number[0] in _SIGNALS:
            wishes.take(number[0])
    os.close(watched)


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _tell(text: bytes) -> None:
    os.write(sys.stderr.fileno(), text)
