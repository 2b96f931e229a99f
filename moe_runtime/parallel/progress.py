"""Where a rank's own thread is, and how many marks it has passed.

Three depths: the phase of the loop (`step`), the entry of the pipeline program (`3F5+4B1'`), the part of a
block (`dispatch layers.3`). Whoever works sets a mark when it begins something; a thread that sets none
stands still, whatever the process around it does. So a heartbeat carries the number of marks, and a live
process without progress shows. Time is judged between marks, not by steps: a step may take minutes, one
part of one block may not.

Listeners are called at every mark, on the thread that set it; the fault injector is one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

PHASES = ("start", "data", "step", "optimizer", "evaluate", "sample", "save", "end")


@dataclass
class Progress:
    """The place of one rank's own thread.

    Args:
        count: marks passed since the process began.
        step: optimizer step under way, from 1; 0 before the first.
        is_first_step: of this process: kernels are compiled and buffers made in it.
        phase: one of `PHASES`.
        entry: of the program, such as `3F5`; empty outside of a program.
        part: of the entry, such as `attend layers.3`, or what is waited for.
        since: `time.perf_counter()` of the newest mark.
        listeners: called with this object after every mark.
    """

    count: int = 0
    step: int = 0
    is_first_step: bool = True
    phase: str = "start"
    entry: str = ""
    part: str = ""
    since: float = field(default_factory=time.perf_counter)
    listeners: list[Callable[["Progress"], None]] = field(default_factory=list)

    def begins_step(self, step: int) -> None:
        """Step `step`, from 1, begins with its data."""
        self.is_first_step = self.step == 0
        self.step = step
        self.enters("data")

    def enters(self, phase: str) -> None:
        """A phase of the loop begins."""
        self.phase, self.entry = phase, ""
        self._mark("")

    def runs(self, entry: str) -> None:
        """An entry of the program begins; empty: the program has ended."""
        self.entry = entry
        self._mark("")

    def begins(self, part: str) -> float:
        """A part of an entry begins; gives the time."""
        self._mark(part)
        return self.since

    def _mark(self, part: str) -> None:
        self.part, self.since = part, time.perf_counter()
        self.count += 1
        for listener in self.listeners:
            listener(self)
