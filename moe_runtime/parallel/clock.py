"""Where a rank's time goes: sums for every step's record, and all spans where a trace is wanted.

Lanes of a trace, each a list of spans (name, start, end) on this process's monotonic clock:

    action     one entry of the program's row, from where its data is there (`3F5+4B1'`)
    phase      one step of an entry (`attend layers.3`, `experts_w layers.4`)
    exchange   an expert exchange, from its call until its rows are there
    wait       the rank stood still, for an `exchange` or a `transfer`
    transfer   a boundary tensor, from the posting of its send until it has left
    live       how many microbatches are alive in this rank's stages, from this moment on

A microbatch counts as alive until the last of its tensors' holders is gone: the object itself tells, by a
finaliser, so a forgotten reference shows as a life that does not end.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from moe_comm.lane import Lane

from moe_runtime.parallel.progress import Progress
from moe_runtime.parallel.starved import own_starvation
from moe_runtime.schedule.action import Entry, Overlap

T = TypeVar("T")
Span = tuple[str, str, float, float]  # lane, name, start, end
EntryKind = tuple[str, int, int]  # kind of action or "pair", stage, stage of the backward of a pair


@dataclass
class Clock:
    """Seconds that this rank stood still, by cause, and where it is now.

    Args:
        exchange_wait_s: waited for expert exchanges.
        transfer_wait_s: waited for pipeline neighbours.
        exchange_s: expert exchanges were under way, those at the same time counted once.
        worked_s: this rank's own work in the program, without its waits and without `starved`.
        peak_live: most microbatches alive at once.
        entries: what each kind of entry took, exchange waits included: (seconds, how often), by `kind_of`.
        spans: of the step, if they are kept; else None.
        progress: what is under way now.
        has_exchanges: expert exchanges go to other ranks; else they are computation like any other.
        arrivals: waits for exchanges beside the rank's own thread, so that the moment of arrival is known
            also where the rank comes later; None: an exchange seems to fly until the rank comes.
        starved: seconds in which the rank's own thread was ready and had no processor.
        meters_s: what measuring has taken since `take_meters_s`, as far as it stands within `metering`.
    """

    exchange_wait_s: float = 0.0
    transfer_wait_s: float = 0.0
    exchange_s: float = 0.0
    worked_s: float = 0.0
    peak_live: int = 0
    entries: dict[EntryKind, tuple[float, int]] = field(default_factory=dict)
    spans: list[Span] | None = None
    progress: Progress = field(default_factory=Progress)
    has_exchanges: bool = True
    arrivals: Lane | None = None
    starved: Callable[[], float] = float
    meters_s: float = 0.0
    _working_since: float = 0.0
    _idle_since: float = 0.0
    _live: int = 0
    _flown_until: float = 0.0

    def restart(self, keep_spans: bool = False) -> None:
        """Begin a step: all sums from zero."""
        self.exchange_wait_s = self.transfer_wait_s = self.exchange_s = self.worked_s = 0.0
        self.peak_live = self._live
        self.entries = {}
        self.spans = [] if keep_spans else None

    def program_begins(self) -> None:
        """The rank works from now on, except while it waits."""
        self._working_since = self._working_time()

    def program_ends(self) -> None:
        """The rank's own work is done."""
        self.worked_s += self._working_time() - self._working_since

    def wait_begins(self) -> float:
        """The rank stands still from now on; gives the time, which `waited` takes."""
        self._idle_since = self._working_time()
        return time.perf_counter()

    def _working_time(self) -> float:
        return time.perf_counter() - self.starved()

    def ran(self, lane: str, name: str, start: float) -> None:
        """A span ends now."""
        if self.spans is not None:
            self.spans.append((lane, name, start, time.perf_counter()))

    def took(self, entry: Entry, start: float) -> None:
        """An entry of the program, which began to compute at `start`, ends now."""
        seconds, times = self.entries.get(kind_of(entry), (0.0, 0))
        self.entries[kind_of(entry)] = seconds + time.perf_counter() - start, times + 1
        if self.spans is not None:
            self.ran("action", str(entry), start)

    @contextmanager
    def metering(self) -> Iterator[None]:
        """What happens within is measuring, not training."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.meters_s += time.perf_counter() - begun

    def take_meters_s(self) -> float:
        """Seconds of `metering` since the last call."""
        seconds, self.meters_s = self.meters_s, 0.0
        return seconds

    def waited(self, cause: str, start: float) -> None:
        """A wait for an `exchange` or a `transfer`, that began at `start`, ends now."""
        seconds = time.perf_counter() - start
        self.worked_s -= self._working_time() - self._idle_since
        if cause == "exchange":
            self.exchange_wait_s += seconds
        else:
            self.transfer_wait_s += seconds
        self.ran("wait", cause, start)

    def watch(self, name: str, wait: Callable[[], T]) -> Callable[[], T]:
        """An expert exchange has been started; gives what waits for it in place of `wait`, once."""
        if not self.has_exchanges:
            return wait
        start = time.perf_counter()
        arrived: Callable[[], tuple[T, float]]
        if self.arrivals is None:
            arrived = partial(_and_time, wait)
        else:
            arrived = self.arrivals.submit(partial(_and_time, wait), torch.device("cpu")).wait

        def finish() -> T:
            begun = self.wait_begins()
            value, end = arrived()
            self.waited("exchange", begun)
            self.flew(name, start, end)
            return value

        return finish

    def flew(self, name: str, start: float, end: float) -> None:
        """An expert exchange was under way; of two at the same time the later told counts what is new."""
        self.exchange_s += max(0.0, end - max(start, self._flown_until))
        self._flown_until = max(self._flown_until, end)
        if self.spans is not None:
            self.spans.append(("exchange", name, start, end))

    def count_life(self, flight: object) -> None:
        """Count an object as alive until nothing refers to it any more."""
        self._change_live(1)
        weakref.finalize(flight, self._change_live, -1)

    def _change_live(self, change: int) -> None:
        self._live += change
        self.peak_live = max(self.peak_live, self._live)
        self.ran("live", str(self._live), time.perf_counter())


def kind_of(entry: Entry) -> EntryKind:
    """What entries have in common that should take equally long: kinds and stages."""
    if isinstance(entry, Overlap):
        return "pair", entry.forward.stage, entry.backward.stage
    return entry.kind.value, entry.stage, -1


def open_clock(ep: int, device: torch.device, ranks_per_node: int) -> Clock:
    """The clock of a rank; call it on the rank's own thread.

    Args:
        ep: ranks of its expert group.
    """
    # Where exchanges block a thread, one beside the rank's own learns when each has arrived.
    arrivals = Lane("arrivals") if ep > 1 and device.type == "cpu" else None
    return Clock(has_exchanges=ep > 1, arrivals=arrivals, starved=own_starvation(ranks_per_node))


def _and_time(wait: Callable[[], T]) -> tuple[T, float]:
    value = wait()
    return value, time.perf_counter()
