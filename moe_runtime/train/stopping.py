"""Ctrl-C and SIGTERM end a run at the next step boundary, on all ranks together, with a checkpoint.

A launcher passes Ctrl-C on to every rank, a scheduler may tell only one: either way the ranks agree
after each step. A later second signal ends this process at once; signals close together are one wish,
for a launcher that is killed lets the kernel send one for each of its threads.

That signal is SIGHUP (`cli/orphan.py`). Nobody watches this rank any more and it must go, but where the run
has other machines it may go on without this one, so the others have to learn why all stop.
"""

import os
import signal
import time
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_WISH_S = 0.5


class StopRequest:
    """Watches for the wish to stop, between `__enter__` and `__exit__`."""

    def __init__(self) -> None:
        self.wanted = False
        self.is_preemption = False  # SIGTERM, from a scheduler; a person's Ctrl-C is SIGINT
        self.is_orphaned = False  # SIGHUP: the launcher of this machine is gone
        self._first_s: float | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._first_s is not None and now - self._first_s > _SAME_WISH_S:
            os._exit(128 + number)
        self.wanted = True
        self.is_preemption = number == signal.SIGTERM
        self.is_orphaned = number == signal.SIGHUP
        self._first_s = now if self._first_s is None else self._first_s
