"""The hand-made programs that a searched one has to beat, simulated at the same costs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moe_runtime import schedule
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.builders import BUILDERS

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Rival:
    """A built-in program on the clock.

    Args:
        peak: most live memory on any rank, in units of `StageCosts.live`.
    """

    name: str
    program: Program
    makespan: float
    peak: float


def rivals(
    num_ranks: int,
    num_microbatches: int,
    model: StageCosts,
    *,
    cap: float | None = None,
    transfer: float = 0.0,
    hidden: float = 1.0,
    chunks: Sequence[int] = (2, 4),
) -> list[Rival]:
    """Every built-in program of these sizes that fits the cap, the shortest first.

    Args:
        model: costs of one P-th of the model, cut into as many stages as each program has.
        chunks: stages a rank, for schedules that leave the choice.
    """
    found = []
    for name, program in _programs(num_ranks, num_microbatches, chunks):
        line = simulate(program, Costs.split(model, num_ranks, program.num_stages, transfer, hidden))
        peak = max(line.peak_memory(rank) for rank in range(num_ranks))
        if cap is None or peak <= cap + _SLACK:
            found.append(Rival(name, program, line.makespan, peak))
    return sorted(found, key=lambda rival: rival.makespan)


def _programs(num_ranks: int, num_microbatches: int, chunks: Sequence[int]) -> Iterator[tuple[str, Program]]:
    for name, builder in BUILDERS.items():
        is_free = builder.limits.min_chunks is not None
        for count in chunks if is_free else (None,):
            if schedule.admissible(name, num_ranks, num_microbatches, count) is None:
                label = f"{name} x{count}" if is_free else name
                yield label, schedule.build(name, num_ranks, num_microbatches, count)
