"""How long pipeline ranks would wait for each other if nothing but the schedule made them wait.

The step's own program is simulated with what its entries took in the mean over ranks and microbatches, and
with messages that take no time. What is left of the waiting is the schedule's: warm-up, cool-down, stages of
unequal work. The distance from there to the measured bubble is the network, noise, and ranks that are slow.

Waiting here is what the measured bubble counts: between a rank's entries and before the first one, not after
its last one, where it goes on to the optimizer; over the same time, the whole step. A simulation takes
milliseconds for a large program, so it is made now and then, and its result stands until the next one.
"""

from statistics import fmean

from moe_runtime.parallel.clock import Clock, EntryKind, kind_of
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule.action import Kind, Program, is_transfer
from moe_runtime.train.meters.one_sum import OneSum

_NOTHING = StageCosts(0.0, 0.0, 0.0)


class IdealBubble:
    """Keeps the newest result.

    Args:
        every: steps after which it is computed anew; so it is in the first two steps of a program, whose
            first one may be that in which kernels are compiled.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._program: Program | None = None
        self._kinds: list[EntryKind] = []
        self._uses = 0
        self._is_due = False
        self.fraction: float | None = None

    def shapes(self, program: Program, step: int) -> dict[str, tuple[int, ...]]:
        """The table that this needs in a step; none where the last result stands."""
        if program is not self._program:
            self._program, self._uses = program, 0
            entries = (entry for row in program.rows for entry in row if not is_transfer(entry))
            self._kinds = sorted({kind_of(entry) for entry in entries})
        self._uses += 1
        self._is_due = self._uses <= 2 or step % self._every == 0
        return {"entries": (len(self._kinds), 2)} if self._is_due else {}

    def fill(self, tables: OneSum, clock: Clock) -> None:
        """Put in what this rank's entries took."""
        if self._is_due:
            for row, kind in zip(tables["entries"], self._kinds, strict=True):
                row[0], row[1] = clock.entries.get(kind, (0.0, 0))

    def read(self, tables: OneSum, step_s: float) -> None:
        """Compute the result anew if it is due.

        Args:
            step_s: wall time of the step.
        """
        if not self._is_due or self._program is None:
            return
        rows = zip(self._kinds, tables["entries"].tolist(), strict=True)
        means = {kind: seconds / times for kind, (seconds, times) in rows if times}
        timeline = simulate(self._program, _costs(means, self._program.num_stages))
        idle = [row[-1].end - timeline.busy(rank) for rank, row in enumerate(timeline.rows) if row]
        self.fraction = fmean(idle) / step_s


def _costs(means: dict[EntryKind, float], num_stages: int) -> Costs:
    """Costs that know nothing but how long each kind of entry takes as a whole."""
    return Costs(
        stages=(_NOTHING,) * num_stages,
        pairs={(ahead, back): took for (kind, ahead, back), took in means.items() if kind == "pair"},
        alone={(Kind(kind), stage): took for (kind, stage, _), took in means.items() if kind != "pair"},
    )
