"""Does every rank reach its end? A dry run without a clock.

The semantics, which are those of the weakest transport we run on: a send and a receive are posted and
never block their rank; a send completes when its receive is posted; a computation blocks until the
receives it needs have completed. So a rank only ever waits in a computation, for a product that
another rank has yet to make (and, once transfers are in, to send). A transport with room for only N
unmatched sends between a pair of ranks is weaker still: there a send beyond the N-th blocks its rank
until a receive makes room, and N = 0 is a rendezvous, where a send waits for its own receive. Whatever
a builder makes, lowered as it is by default, runs with N = 1; gpipe, 1f1b and zb1p run with N = 0.

Whether a program of this kind deadlocks does not depend on speeds: what a rank waits for is fixed by
the program, never by who came first (`waits.py`). One dry run, in any order, therefore stands for all.

It does depend on speeds how many sends wait for their receive. Each rank carries a vector clock: how
far every rank must have come for this rank to be here. Receives posted by then are certain; the other
sends may be waiting, and a schedule in which they do wait is possible, since what must have happened
is all that has happened. The peak of that count bounds a transport's outstanding messages.

Only the clocks of ranks that one sends to are read. Where the ranks exchange along a tree (a line, for
all schedules but the interleaved one, whose ends meet), news of such a rank that comes by way of a
third has passed through the reader itself, and is old: what the rank said last is all there is to
know, and clocks need not be merged.

Clocks only change where a rank may have to wait, so the run goes from one such stop to the next and
not from entry to entry.
"""

from bisect import bisect_left, bisect_right

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Program, is_transfer, where
from moe_runtime.schedule.matching import Channels
from moe_runtime.schedule.products import remote_needs
from moe_runtime.schedule.waits import Cause, Waits, waits_of

Clock = tuple[int, ...]  # entries that each rank must have done


def check_progress(program: Program, channels: Channels, max_unmatched: int | None = None) -> tuple[int, ...]:
    """Check that no rank waits for ever.

    Args:
        channels: as `check_matching` gives them.
        max_unmatched: sends of one ordered pair of ranks that may wait for their receive before the
            next one blocks its rank; None for no limit.

    Returns:
        per rank, the most sends that may wait for their receive at once.

    Raises:
        ScheduleError: deadlock; names the entry at which each rank is blocked and what it waits for.
    """
    run = _DryRun(program, waits_of(program, channels, max_unmatched), channels)
    moved = True
    while moved:
        moved = sum(run.advance(rank) for rank in range(program.num_ranks)) > 0
    blocked = [run.blocked_head(rank) for rank in range(program.num_ranks) if not run.at_end(rank)]
    if blocked:
        raise ScheduleError(f"schedule {program.name}: deadlock: {'; '.join(blocked)}")
    return tuple(run.peak_unmatched)


def exchange_along_a_tree(channels: Channels) -> bool:
    """Whether there is one way only from any rank to any other, along channels in either direction."""
    # a program's stages are a chain, so the ranks that exchange anything are connected
    edges = {frozenset(pair) for pair in channels}
    ranks = {rank for pair in channels for rank in pair}
    return len(edges) == len(ranks) - 1


class _DryRun:
    """How far every rank has come, stop by stop, and what it knows of the others."""

    def __init__(self, program: Program, waits: Waits, channels: Channels) -> None:
        ranks = range(program.num_ranks)
        self.program = program
        self.waits = waits
        self.stops = [[*sorted(waits[rank]), len(program.rows[rank])] for rank in ranks]
        self.passed = [0 for _ in ranks]  # stops
        self.channels = [  # of each rank, the channels it sends on, by receiving rank
            [(target, channel) for (source, target), channel in channels.items() if source == rank]
            for rank in ranks
        ]
        self.clocks = [[0 for _ in ranks] for _ in ranks]
        self.merges = bool(channels) and not exchange_along_a_tree(channels)
        self.past: list[list[Clock]] = [[tuple(clock)] for clock in self.clocks]  # after each stop, to merge
        self.peak_unmatched = [self.unmatched(rank) for rank in ranks]

    def done(self, rank: int) -> int:
        """Entries that the rank has done: all before the first stop that it has not passed."""
        return self.stops[rank][self.passed[rank]]

    def at_end(self, rank: int) -> bool:
        return self.passed[rank] == len(self.stops[rank]) - 1

    def missing(self, rank: int) -> list[Cause]:
        """What the rank's next stop waits for and is not done."""
        causes = self.waits[rank][self.done(rank)]
        return [(source, position) for source, position in causes if self.done(source) <= position]

    def advance(self, rank: int) -> int:
        """Run `rank` until it ends or blocks; the number of stops that it passed."""
        start = self.passed[rank]
        while not self.at_end(rank) and not self.missing(rank):
            self.learn(rank, self.waits[rank][self.done(rank)])
            self.passed[rank] += 1
            self.peak_unmatched[rank] = max(self.peak_unmatched[rank], self.unmatched(rank))
        return self.passed[rank] - start

    def learn(self, rank: int, causes: list[Cause]) -> None:
        """Bring the rank's clock to where it is once it has been told of `causes`."""
        clock = self.clocks[rank]
        for source, position in causes:
            if self.merges:
                told = self.past[source][bisect_right(self.stops[source], position)]
                clock[:] = map(max, clock, told)
            clock[source] = max(clock[source], position + 1)
        if self.merges:
            self.past[rank].append(tuple(clock))

    def unmatched(self, rank: int) -> int:
        """Sends of `rank` up to its next stop whose receive is not known to be posted."""
        clock, end, unmatched = self.clocks[rank], self.done(rank), 0
        for target, channel in self.channels[rank]:
            sent = bisect_left(channel.sends, end)
            received = bisect_left(channel.receives, clock[target])
            unmatched += max(0, sent - received)
        return unmatched

    def blocked_head(self, rank: int) -> str:
        position = self.done(rank)
        entry = self.program.rows[rank][position]
        return f"{where(rank, position, entry)} waits for {' and '.join(self.reasons(rank, position))}"

    def reasons(self, rank: int, position: int) -> list[str]:
        entry, missing = self.program.rows[rank][position], self.missing(rank)
        if is_transfer(entry):  # a send that finds no room
            rows = self.program.rows
            return [f"the room that {where(source, at, rows[source][at])} makes" for source, at in missing]
        needs = zip(remote_needs(self.program, rank, entry), self.waits[rank][position], strict=True)
        return [f"{need} from rank {cause[0]}" for need, cause in needs if cause in missing]
