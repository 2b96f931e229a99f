"""What a program is worth under given costs: proved right, simulated, and set against a lower bound."""

from dataclasses import dataclass, replace

from moe_runtime.planner.bound import lower_bound
from moe_runtime.planner.costs import Costs
from moe_runtime.planner.figures import Figures, figures_of
from moe_runtime.planner.instance import Instance
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Timeline
from moe_runtime.schedule import Program, Report


@dataclass(frozen=True, slots=True)
class Outcome:
    """A program and what it comes to.

    Args:
        report: of the check, with transfers in.
        bound: a makespan that no program could beat, in the timeline's unit.
        cap: most live memory that was allowed on a rank, in units of one P-th of the model; None for any.
    """

    program: Program
    report: Report
    timeline: Timeline
    bound: float
    cap: float | None = None

    @property
    def figures(self) -> Figures:
        return figures_of(self.timeline)

    @property
    def gap(self) -> float:
        """How much longer the step is than the bound, as a share of the bound."""
        gap = self.timeline.makespan / self.bound - 1 if self.bound else 0.0
        return gap if abs(gap) > 1e-9 else 0.0

    @property
    def peak_memory(self) -> float:
        """Most live memory of any rank, in units of one microbatch in one P-th of the model."""
        return max(map(self.timeline.peak_memory, range(self.program.num_ranks)))

    @property
    def is_within_cap(self) -> bool:
        return self.cap is None or self.peak_memory <= self.cap + 1e-9

    def parameters(self, rank: int) -> float:
        """Parameters that a rank holds, in units of one P-th of the model."""
        stages = {stage for _, stage in self.program.stages_of(rank)}
        return len(stages) * self.program.num_ranks / self.program.num_stages


def assess(
    program: Program, costs: Costs, *, cap: float | None = None, bound: float | None = None, unit: str = ""
) -> Outcome:
    """Check and simulate a program.

    Args:
        program: with or without transfers.
        cap: as in `Outcome`.
        bound: a lower bound already known; None reckons the one of the program's placement.
        unit: of the costs, "s" or "" for any other.

    Raises:
        ScheduleError: the program is wrong, or is not of the stages that the costs are of.
    """
    report = program.check()
    timeline = replace(simulate(program, costs), unit=unit)
    outcome = Outcome(program, report, timeline, bound or 0.0, cap)
    if bound is not None:
        return outcome
    # A program that breaks the cap can also be faster than any that keeps it.
    kept = cap if outcome.is_within_cap else None
    instance = Instance(program.placement, program.num_microbatches, costs)
    return replace(outcome, bound=lower_bound(instance, kept))
