"""Ctrl-C and SIGTERM end a run at the next step boundary, on all ranks together, with a checkpoint.

A launcher passes Ctrl-C on to every rank, a scheduler may tell only one: either way the ranks agree
after each step. A second signal ends this process at once.
"""

import os
import signal
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Watches for the wish to stop, between `__enter__` and `__exit__`."""

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.wanted:
            os._exit(128 + number)
        self.wanted = True
