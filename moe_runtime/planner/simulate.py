"""A program on a clock: when every entry starts and ends, given what actions cost.

Each rank has two lanes. On its computation lane it walks its row in order, as the executor does: an
entry starts when the one before it has ended and what it needs from neighbour stages has arrived. Its
communication lane carries expert exchanges and boundary messages, one at a time:

    exchange   flies while its entry runs, and takes that share of the entry's time
    message    leaves when the entry that made it ends, and the lane is free: first come, first served;
               it arrives `Costs.transfer` later. Between stages of one rank nothing is sent.

So messages fly beside whatever the rank does next, and cost it time only where the lane is short: an
entry that begins while messages are still leaving (a backlog) hides them in the time in which its own
exchanges are not under way, and grows by what does not fit,

    time = duration + max(0, backlog - (duration - exchange))      if it has an exchange at all.

An entry bound by computation is never held up by messages, one bound by communication always is.

No event queue is needed. A rank's lanes depend on its own row and on the arrival of products alone,
never on what another rank does at the same time, so each rank runs as far as it can and the ranks are
visited until all have ended; the order of the visits cannot show. Transfers in a lowered program are
passed over: a send stands right after the entry that makes its tensor, which is when it leaves here,
and receives cost nothing. Rejected: a message in the receiver's lane too. Links carry both ways at
once, and then one slow rank would hold up two lanes for one message.
"""

from dataclasses import dataclass, field

from moe_runtime.errors import ScheduleError
from moe_runtime.planner.costs import Costs
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.schedule.action import Entry, Kind, Program, actions_of, is_transfer, where
from moe_runtime.schedule.products import Product, made_by, needed_by, user_of


def simulate(program: Program, costs: Costs) -> Timeline:
    """When each rank of a program does what.

    Args:
        program: with or without transfers; the result is the same.
        costs: of every stage of the program, in any unit of time.

    Raises:
        ScheduleError: costs of another number of stages, or a program that waits for ever.
    """
    if len(costs.stages) != program.num_stages:
        counts = f"expected costs of {program.num_stages} stages, got costs of {len(costs.stages)} stages"
        raise ScheduleError(f"schedule {program.name}: {counts}")
    run = _Run(program, costs)
    moved = 1
    while moved:
        moved = sum(run.advance(rank) for rank in range(program.num_ranks))
    run.check_ended()
    title = f"{program.name}, {program.num_ranks} ranks, {program.num_microbatches} microbatches"
    rows = tuple(tuple(lanes.spans) for lanes in run.lanes)
    return Timeline(title, rows, tuple(_memory(row, costs) for row in rows))


@dataclass(slots=True)
class _Lanes:
    """One rank: its row without transfers, and when each of its lanes is free."""

    row: tuple[Entry, ...]
    spans: list[Span] = field(default_factory=list)
    free_at: float = 0.0
    comm_free_at: float = 0.0


class _Run:
    """How far every rank has come, and when each product is there for the stage that needs it."""

    def __init__(self, program: Program, costs: Costs) -> None:
        self.program = program
        self.costs = costs
        self.lanes = [_Lanes(tuple(each for each in row if not is_transfer(each))) for row in program.rows]
        self.arrivals: dict[Product, float] = {}

    def advance(self, rank: int) -> bool:
        """Run a rank until it ends or waits for a product not made yet; whether it came further."""
        lanes = self.lanes[rank]
        before = len(lanes.spans)
        while len(lanes.spans) < len(lanes.row):
            entry = lanes.row[len(lanes.spans)]
            arrived = self._arrived(entry)
            if arrived is None:
                break
            self._run(rank, entry, max(lanes.free_at, arrived))
        return len(lanes.spans) > before

    def _arrived(self, entry: Entry) -> float | None:
        """When all that an entry needs is there; None if some of it has not been made."""
        latest = 0.0
        for action in actions_of(entry):
            need = needed_by(action, self.program.num_stages)
            if need is not None:
                if need not in self.arrivals:
                    return None
                latest = max(latest, self.arrivals[need])
        return latest

    def _run(self, rank: int, entry: Entry, start: float) -> None:
        lanes, costs = self.lanes[rank], self.costs
        exchange, time = costs.comm(entry), costs.duration(entry)
        if exchange > 0:
            backlog = max(0.0, lanes.comm_free_at - start)
            time += max(0.0, backlog - max(0.0, time - exchange))
        end = lanes.free_at = start + time
        exposed = min(exchange, max(0.0, time - costs.compute(entry)))
        lanes.spans.append(Span(entry, start, end, exchange, exposed))
        for action in actions_of(entry):
            product = made_by(action)
            user = None if product is None else user_of(self.program, product)
            if product is not None and user is not None:
                self.arrivals[product] = end if user == rank else self._send(lanes, end)

    def _send(self, lanes: _Lanes, made_at: float) -> float:
        """When a message that a rank makes arrives."""
        lanes.comm_free_at = max(lanes.comm_free_at, made_at) + self.costs.transfer
        return lanes.comm_free_at

    def check_ended(self) -> None:
        """Raise ScheduleError with each rank's blocked entry, if any rank has not come to its end."""
        blocked = [
            where(rank, len(lanes.spans), lanes.row[len(lanes.spans)])
            for rank, lanes in enumerate(self.lanes)
            if len(lanes.spans) < len(lanes.row)
        ]
        if blocked:
            raise ScheduleError(f"schedule {self.program.name}: deadlock: {'; '.join(blocked)}")


def _memory(row: tuple[Span, ...], costs: Costs) -> tuple[tuple[float, float], ...]:
    """Live memory of a rank at every change: from the start of an F to the end of its B or W."""
    live, changes = 0.0, []
    for span in row:
        actions = actions_of(span.entry)
        taken = sum(costs.live(action) for action in actions if action.kind is Kind.FORWARD)
        freed = sum(costs.live(action) for action in actions if action.kind in _FREEING)
        if taken:
            live += taken
            changes.append((span.start, live))
        if freed:
            live -= freed
            changes.append((span.end, live))
    return tuple(changes)


_FREEING = (Kind.BACKWARD, Kind.WEIGHT_GRAD)
