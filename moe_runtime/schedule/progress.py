"""Does every rank reach its end? A dry run without a clock.

The semantics, which are those of the weakest transport we run on: a send and a receive are posted and
never block their rank; a send completes when its receive is posted; a computation blocks until the
receives it needs have completed. So a rank only ever waits in a computation, for a product that
another rank has yet to make (and, once transfers are in, to send).

Whether a program of this kind deadlocks does not depend on speeds: what a rank waits for is fixed by
the program, never by who came first. One dry run, in any order, therefore stands for all.

It does depend on speeds how many sends wait for their receive. Each rank carries a vector clock: how
far every rank must have come for this rank to be here. Receives posted by then are certain; the other
sends may be waiting, and a schedule in which they do wait is possible, since what must have happened
is all that has happened. The peak of that count bounds a transport's outstanding messages.
"""

from bisect import bisect_left
from collections.abc import Sequence

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Program, actions_of, where
from moe_runtime.schedule.matching import Channels
from moe_runtime.schedule.products import Product, carried_by, holder_of, made_by, remote_needs


def check_progress(program: Program, channels: Channels) -> tuple[int, ...]:
    """Check that no rank waits for ever.

    Args:
        channels: as `check_matching` gives them.

    Returns:
        per rank, the most sends that may wait for their receive at once.

    Raises:
        ScheduleError: deadlock; names the entry at which each rank is blocked and what it waits for.
    """
    run = _DryRun(program, channels)
    moved = 1
    while moved:
        moved = sum(run.advance(rank) for rank in range(program.num_ranks))
    blocked = [run.blocked_head(rank) for rank in range(program.num_ranks) if not run.at_end(rank)]
    if blocked:
        raise ScheduleError(f"schedule {program.name}: deadlock: {'; '.join(blocked)}")
    return tuple(run.peak_unmatched)


class _DryRun:
    """How far every rank has come, what it has published, and what it knows of the others."""

    def __init__(self, program: Program, channels: Channels) -> None:
        self.program = program
        self.channels = [  # of each rank, the channels it sends on, by receiving rank
            [(target, channel) for (source, target), channel in channels.items() if source == rank]
            for rank in range(program.num_ranks)
        ]
        self.lowered = program.has_transfers
        self.clocks = [[0] * program.num_ranks for _ in program.rows]
        self.published: dict[Product, Sequence[int]] = {}  # with the publisher's clock at that time
        self.peak_unmatched = [0] * program.num_ranks

    def at_end(self, rank: int) -> bool:
        return self.clocks[rank][rank] == len(self.program.rows[rank])

    def missing(self, rank: int) -> tuple[Product, ...]:
        """What the next entry of `rank` needs and no other rank has published."""
        entry = self.program.rows[rank][self.clocks[rank][rank]]
        needs = remote_needs(self.program, rank, entry)
        return tuple(need for need in needs if need not in self.published)

    def blocked_head(self, rank: int) -> str:
        position = self.clocks[rank][rank]
        waits = [f"{need} from rank {holder_of(self.program, need)}" for need in self.missing(rank)]
        return f"{where(rank, position, self.program.rows[rank][position])} waits for {' and '.join(waits)}"

    def advance(self, rank: int) -> int:
        """Run `rank` until it ends or blocks; the number of entries that it came further."""
        start = self.clocks[rank][rank]
        while not self.at_end(rank) and not self.missing(rank):
            self._step(rank)
        return self.clocks[rank][rank] - start

    def _step(self, rank: int) -> None:
        clock = self.clocks[rank]
        entry = self.program.rows[rank][clock[rank]]
        for need in remote_needs(self.program, rank, entry):
            clock[:] = map(max, clock, self.published[need])
        clock[rank] += 1
        if isinstance(entry, Action) and entry.kind.is_send:
            self.published[carried_by(entry)] = tuple(clock)
            self.peak_unmatched[rank] = max(self.peak_unmatched[rank], self._unmatched_sends(rank))
        elif not self.lowered:
            made = (made_by(action) for action in actions_of(entry))
            self.published.update({product: tuple(clock) for product in made if product is not None})

    def _unmatched_sends(self, rank: int) -> int:
        """Sends of `rank` whose receive is not known to be posted."""
        clock, unmatched = self.clocks[rank], 0
        for target, channel in self.channels[rank]:
            sent = bisect_left(channel.sends, clock[rank])
            received = bisect_left(channel.receives, clock[target])
            unmatched += max(0, sent - received)
        return unmatched
