"""Programs that repeat: every microbatch goes the same way, one period after the one before it.

Where memory is short, a greedy walk through time wastes it: a rank takes in forwards that then wait at
the next rank, and live the longer. Little's law says what counts: with one microbatch a period, the
memory of a stage is the time that an activation lives there, divided by the period. So lives have to
be short, and they are shortest where nothing ever waits.

A pattern is one microbatch's way through the pipeline, such that all of them can go that way, a period
apart, without meeting on a rank. It is laid down action by action along the way, forwards, then
gradients, each at the first time that is free on its rank, where time is a circle as long as the period;
weight gradients come last, into the gaps. If overlapping gains, a gradient may also join a forward
that is alone in its place on the circle, and the two become an overlap.

Only the order of a row is kept of a pattern; the clock closes what gaps are left, above all at the
beginning and at the end, where the ranks are not full. So a pattern need not be exact: one that finds
no room lies on top of another. What is searched is the period and, for each action, a delay.

The idea is that of software pipelining by modulo scheduling; that lives decide over memory is from
"Pipeline Parallelism with Controllable Memory" (Qi et al., 2024), whose schedules are patterns of the V.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from moe_runtime.planner.instance import B, F, I, Instance, Rows, W

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Way:
    """What a pattern is made from.

    Args:
        period: between one microbatch of a direction and the next.
        delays: per lane of its forward, then per lane of its gradient: time to let pass.
        hosts: per lane, whether its forward leaves room for a gradient to join it.
        patience: how much later a gradient may end for joining a forward.
    """

    period: float
    delays: tuple[float, ...]
    hosts: tuple[bool, ...]
    patience: float = 0.0


def repeat(instance: Instance, way: Way) -> Rows:
    """The rows of the pattern that a way leads to; they may wait for ever, or need any memory."""
    circles = [_Circle(way.period) for _ in range(instance.num_ranks)]
    starts = _lay(instance, way, circles)
    joined = {joiner: host for circle in circles for host, joiner in circle.joined.items()}
    rows: list[list[tuple[float, int]]] = [[] for _ in range(instance.num_ranks)]
    for lane, rank in enumerate(instance.rank_of):
        host = joined.get(lane)
        for micro in range(instance.micros):
            shift = micro * way.period
            forward = instance.number(lane, micro, F)
            rows[rank].append((starts[lane, F] + shift, forward))
            if host is not None:
                behind = micro + round((starts[lane, I] - starts[host, F]) / way.period)
                if 0 <= behind < instance.micros:
                    hosting = instance.number(host, behind, F)
                    rows[rank].append((starts[lane, I] + shift, instance.overlap(hosting, forward - F + B)))
                    continue
            rows[rank].append((starts[lane, I] + shift, forward - F + I))
            rows[rank].append((starts[lane, W] + shift, forward - F + W))
    return [_in_order(instance, row) for row in rows]


def _in_order(instance: Instance, row: list[tuple[float, int]]) -> list[int]:
    """A row by time, without the forwards that overlaps contain."""
    contained = {instance.parts(entry)[0] for _, entry in row if entry >= instance.num_actions}
    return [entry for _, entry in sorted(row) if entry not in contained]


@dataclass(slots=True)
class _Circle:
    """One rank's time, modulo the period.

    Args:
        slots: (start, length) of what is there.
        hosts: the lanes whose forward is alone in its slot, with its start.
        joined: which lane's gradient has joined which lane's forward.
    """

    period: float
    slots: list[tuple[float, float]] = field(default_factory=list)
    hosts: dict[int, float] = field(default_factory=dict)
    joined: dict[int, int] = field(default_factory=dict)

    def place(self, ready: float, length: float) -> float:
        """Take the first free time from `ready` on."""
        start = self.free_from(ready, length)
        self.slots.append((start % self.period, length))
        return start

    def free_from(self, ready: float, length: float) -> float:
        """The first time from `ready` on that is free for so long; `ready` itself if there is none."""
        start, period = ready, self.period
        while start - ready <= period:
            for begin, size in self.slots:
                behind, ahead = (start - begin) % period, (begin - start) % period
                if behind < size - _SLACK:
                    start += size - behind
                    break
                if ahead < length - _SLACK:
                    start += ahead + size
                    break
            else:
                return start
        return ready

    def first_host(self, ready: float) -> tuple[float, int | None]:
        """The lane whose lone forward comes first from `ready` on, and when."""
        waits = [((start - ready + _SLACK) % self.period, lane) for lane, start in self.hosts.items()]
        wait, lane = min(waits, default=(0.0, None))
        return ready + wait, lane


def _lay(instance: Instance, way: Way, circles: Sequence[_Circle]) -> dict[tuple[int, int], float]:
    """Lay one microbatch of each direction down; (lane, kind) -> start."""
    starts: dict[tuple[int, int], float] = {}
    time, number, stages = instance.time, instance.number, instance.num_stages
    for first in range(0, instance.num_lanes, stages):
        ready = 0.0
        for lane in range(first, first + stages):
            circle = circles[instance.rank_of[lane]]
            alone = time[number(lane, 0, F)]
            length = max(alone, instance.pair_time[lane][lane]) if way.hosts[lane] else alone
            starts[lane, F] = start = circle.place(ready + way.delays[lane], length)
            if way.hosts[lane]:
                circle.hosts[lane] = start
            ready = start + length + instance.costs.transfer * instance.sent[number(lane, 0, F)]
        for lane in reversed(range(first, first + stages)):
            circle = circles[instance.rank_of[lane]]
            delayed = ready + way.delays[instance.num_lanes + lane]
            start, length = _lay_gradient(instance, way, circle, lane, delayed)
            starts[lane, I] = start
            ready = start + length + instance.costs.transfer * instance.sent[number(lane, 0, I)]
    for lane, rank in enumerate(instance.rank_of):
        done = starts[lane, I] + time[number(lane, 0, I)]
        is_joined = lane in circles[rank].joined.values()
        starts[lane, W] = done if is_joined else circles[rank].place(done, time[number(lane, 0, W)])
    return starts


def _lay_gradient(
    instance: Instance, way: Way, circle: _Circle, lane: int, ready: float
) -> tuple[float, float]:
    """Lay a gradient down, with a forward if that is soon enough; its start and length."""
    length = instance.time[instance.number(lane, 0, I)]
    alone = circle.free_from(ready, length)
    start, host = circle.first_host(ready)
    if host is not None:
        together = instance.pair_time[host][lane]
        if start + together <= alone + length + way.patience:
            del circle.hosts[host]
            circle.joined[host] = lane
            return start, together
    return circle.place(ready, length), length
