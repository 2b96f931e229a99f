"""Says in a pipe what a run is doing, once that takes long, and again the longer it takes.

Most phases are over before anybody wonders, and a line for each would bury the steps. So a thread waits
beside the run: when a phase has lasted for some seconds it says so, then again at three times that age, and
so on. The end of a phase that was told is told too.
"""

import threading
import time
from collections.abc import Callable

_AGAIN = 3.0  # age of a phase, relative to when it was last told, at which it is told again


class PhaseLines:
    """Watches one phase at a time.

    Args:
        say: prints a line; called on a thread of its own.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._changed = threading.Condition()
        self._text, self._detail, self._is_told = "", "", False
        self._since = self._next_s = 0.0
        self._thread: threading.Thread | None = None
        self._closed = False

    def enters(self, text: str, patience_s: float) -> None:
        """A phase begins and the last one ends; empty: nothing worth telling is being done."""
        with self._changed:
            if self._is_told:
                self._say(f"{self._text}: done after {time.monotonic() - self._since:.0f} s")
            self._text, self._detail, self._is_told = text, "", False
            self._since, self._next_s = time.monotonic(), patience_s
            if text and self._thread is None:
                self._thread = threading.Thread(target=self._watch, name="phase lines", daemon=True)
                self._thread.start()
            self._changed.notify()

    def detail(self, text: str) -> None:
        """How far the present phase is; said with it."""
        self._detail = text

    def close(self) -> None:
        """Say nothing any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(1.0)

    def _watch(self) -> None:
        with self._changed:
            while not self._closed:
                age = time.monotonic() - self._since
                if not self._text:
                    self._changed.wait()
                elif age < self._next_s:
                    self._changed.wait(self._next_s - age)
                else:
                    how_far = f"{self._detail}, " if self._detail else ""
                    self._say(f"{self._text}: {how_far}{age:.0f} s so far")
                    self._next_s, self._is_told = age * _AGAIN, True
