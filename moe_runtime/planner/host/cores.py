"""Ranks that share the cores of one machine, on a clock.

Each rank is a list of operations that it does in order:

    Work      computes for so many core-seconds
    Start     posts an exchange with the ranks of its group; it flies when all of them have come
    Wait      stands still until the exchange has arrived here
    Need      stands still until a message has arrived
    Send      posts a message to another rank
    Mark      notes the time

A rank that computes needs a core. With more of them than cores, each has an equal share, as the kernel's
scheduler gives it; a rank that stands still leaves its share to the others. Bytes are moved by threads beside
the rank's own (`background` core-seconds, on every rank that takes part). Such a thread has slept, so the
scheduler lets it go first: it has a core of its own as long as there is one. Then the bytes cross the link,
if the cluster has one between the ranks: links carry one message after the other.

Time goes from event to event: between two of them all shares stay as they are. Rejected: the simulator of
programs (`simulate.py`), whose ranks cannot slow each other down; and one step of a fixed length after the
other, which would have to be shorter than the shortest phase, some microseconds.
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

_NOTHING = 1e-12  # core-seconds that rounding may leave


@dataclass(frozen=True, slots=True)
class Work:
    """Computation of one phase, in core-seconds."""

    seconds: float
    name: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """An exchange of `members`, told apart by `key`.

    Args:
        background: core-seconds that moving its bytes takes on this rank.
        link_s: that its bytes take on this rank's link, 0 without one.
    """

    key: Hashable
    members: tuple[int, ...]
    background: float
    link_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Wait:
    """Until the exchange is here."""

    key: Hashable


@dataclass(frozen=True, slots=True)
class Send:
    """A message to `peer`; fields as in `Start`."""

    key: Hashable
    peer: int
    background: float
    link_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Need:
    """Until the message is here."""

    key: Hashable


@dataclass(frozen=True, slots=True)
class Mark:
    """A note of the time."""

    name: Hashable


Operation = Work | Start | Wait | Send | Need | Mark


@dataclass
class RankTimes:
    """What a rank did, in seconds.

    Args:
        work: by name of phase, from beginning to end, others' turns on its core included.
        waited_exchange, waited_message: stood still.
        marks: (name, time).
        end: of its last operation.
    """

    work: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    waited_exchange: float = 0.0
    waited_message: float = 0.0
    marks: list[tuple[Hashable, float]] = field(default_factory=list)
    end: float = 0.0


def run_on_cores(ranks: Sequence[Sequence[Operation]], cores: int) -> list[RankTimes]:
    """Run all ranks to their end.

    Args:
        ranks: operations of each, in order.
        cores: of the machine.

    Raises:
        ValueError: some ranks wait for ever.
    """
    run = _Run(ranks, cores)
    while run.advance():
        pass
    return run.times


@dataclass(slots=True)
class _Task:
    """Background work of one rank for one exchange or message."""

    left: float
    key: Hashable
    to: int
    link_s: float
    node: int


class _Run:
    """The state between two events."""

    def __init__(self, ranks: Sequence[Sequence[Operation]], cores: int) -> None:
        self.ranks, self.cores, self.now = ranks, cores, 0.0
        self.times = [RankTimes() for _ in ranks]
        self.place = [0] * len(ranks)
        self.left = [0.0] * len(ranks)
        self.since = [0.0] * len(ranks)
        self.tasks: list[_Task] = []
        self.posted: dict[Hashable, list[tuple[int, Start]]] = defaultdict(list)
        self.arrived: set[tuple[Hashable, int]] = set()
        self.pending: dict[tuple[Hashable, int], int] = {}
        self.link_free: dict[int, float] = defaultdict(float)
        self.flying: list[tuple[float, Hashable, int]] = []
        self.blocked: list[bool] = [False] * len(ranks)
        for rank in range(len(ranks)):
            self._enter(rank)

    def advance(self) -> bool:
        """Go to the next event; False at the end."""
        computing = [rank for rank in range(len(self.ranks)) if self._computes(rank)]
        ahead = min(1.0, self.cores / len(self.tasks)) if self.tasks else 1.0
        room = self.cores - ahead * len(self.tasks)
        share = min(1.0, max(room, 0.0) / len(computing)) if computing else 1.0
        step = min(
            [task.left / ahead for task in self.tasks]
            + [self.left[rank] / share for rank in computing if share > 0]
            + [time - self.now for time, _, _ in self.flying],
            default=math.inf,
        )
        if math.isinf(step):
            if any(place < len(ops) for place, ops in zip(self.place, self.ranks, strict=True)):
                raise ValueError("ranks wait for each other for ever")
            return False
        self.now += max(step, 0.0)
        for task in self.tasks:
            task.left -= step * ahead
        for rank in computing:
            self.left[rank] -= step * share
        self._finish(computing)
        return True

    def _computes(self, rank: int) -> bool:
        ops = self.ranks[rank]
        return self.place[rank] < len(ops) and isinstance(ops[self.place[rank]], Work)

    def _finish(self, computing: Sequence[int]) -> None:
        """End what has ended by now."""
        for task in [task for task in self.tasks if task.left <= _NOTHING]:
            self.tasks.remove(task)
            self._fly(task)
        for flight in [flight for flight in self.flying if flight[0] <= self.now + _NOTHING]:
            self.flying.remove(flight)
            self._land(flight[1], flight[2])
        for rank in computing:
            if self.left[rank] <= _NOTHING:
                operation = self.ranks[rank][self.place[rank]]
                assert isinstance(operation, Work)
                self.times[rank].work[operation.name] += self.now - self.since[rank]
                self.place[rank] += 1
                self._enter(rank)

    def _fly(self, task: _Task) -> None:
        """Bytes of a task are packed: they cross the link, or are there."""
        if task.link_s <= 0:
            self._land(task.key, task.to)
            return
        begin = max(self.now, self.link_free[task.node])
        self.link_free[task.node] = begin + task.link_s
        self.flying.append((begin + task.link_s, task.key, task.to))

    def _land(self, key: Hashable, to: int) -> None:
        left = self.pending[key, to] = self.pending[key, to] - 1
        if left == 0:
            self.arrived.add((key, to))
            if self.blocked[to]:
                self._enter(to)

    def _enter(self, rank: int) -> None:
        """Do operations of a rank until it computes, waits, or has ended."""
        ops, times = self.ranks[rank], self.times[rank]
        was_blocked, self.blocked[rank] = self.blocked[rank], False
        while self.place[rank] < len(ops):
            operation = ops[self.place[rank]]
            if isinstance(operation, Work):
                self.left[rank], self.since[rank] = operation.seconds, self.now
                return
            if isinstance(operation, Wait | Need):
                if (operation.key, rank) not in self.arrived:
                    self.blocked[rank] = True
                    if not was_blocked:
                        self.since[rank] = self.now
                    return
                if was_blocked:
                    self._count_wait(rank, operation)
                was_blocked = False
                self.arrived.discard((operation.key, rank))
            elif isinstance(operation, Start):
                self._post(rank, operation)
            elif isinstance(operation, Send):
                self.pending[operation.key, operation.peer] = 1
                self._begin(operation.key, operation.peer, operation.background, operation.link_s, rank)
            else:
                times.marks.append((operation.name, self.now))
            self.place[rank] += 1
        times.end = self.now

    def _count_wait(self, rank: int, operation: Wait | Need) -> None:
        seconds = self.now - self.since[rank]
        if isinstance(operation, Wait):
            self.times[rank].waited_exchange += seconds
        else:
            self.times[rank].waited_message += seconds

    def _post(self, rank: int, start: Start) -> None:
        """One more rank has come to an exchange; with the last one it begins, from all to all."""
        come = self.posted[start.key]
        come.append((rank, start))
        if len(come) < len(start.members):
            return
        for to, _ in come:
            self.pending[start.key, to] = len(come)
        for source, own in self.posted.pop(start.key):
            for to in own.members:
                share = len(own.members)
                self._begin(own.key, to, own.background / share, own.link_s / share, source)

    def _begin(self, key: Hashable, to: int, background: float, link_s: float, node: int) -> None:
        if background <= 0 and link_s <= 0:
            self._land(key, to)
            return
        self.tasks.append(_Task(max(background, _NOTHING), key, to, link_s, node))
