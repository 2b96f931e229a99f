"""The schedules by name. A new one is a builder file and a line in the table below."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.dualpipe import dualpipe
from moe_runtime.schedule.limits import Limits
from moe_runtime.schedule.one_f_one_b import one_f_one_b
from moe_runtime.schedule.single import single


@dataclass(frozen=True, slots=True)
class Builder:
    """A way to make a program, and the sizes for which it works."""

    make: Callable[[int, int], Program]
    limits: Limits


BUILDERS = {
    "single": Builder(single, Limits(max_ranks=1)),
    "1f1b": Builder(one_f_one_b, Limits()),
    "dualpipe": Builder(
        dualpipe, Limits(rank_multiple=2, microbatch_multiple=2, min_microbatches_per_rank=2)
    ),
}


def build(name: str, num_ranks: int, num_microbatches: int) -> Program:
    """A pipeline program of computations alone; `passes.lower` adds the transfers.

    Args:
        name: a key of `BUILDERS`.
        num_ranks: P, pipeline ranks.
        num_microbatches: M, microbatches a step and data-parallel lane, over all directions.

    Raises:
        ScheduleError: unknown name, or sizes that the schedule does not admit; names the nearest ones.
    """
    problem = admissible(name, num_ranks, num_microbatches)
    if problem is not None:
        raise ScheduleError(problem)
    return BUILDERS[name].make(num_ranks, num_microbatches)


def admissible(name: str, num_ranks: int, num_microbatches: int) -> str | None:
    """Why `build` would refuse these sizes, in one line; None if it would not.

    Raises:
        ScheduleError: unknown name.
    """
    limits = _builder(name).limits
    problem = limits.ranks_problem(num_ranks) or limits.microbatches_problem(num_ranks, num_microbatches)
    return None if problem is None else f"schedule {name}: {problem}"


def nearest_microbatches(name: str, num_ranks: int, num_microbatches: int) -> int:
    """The admissible number of microbatches nearest to the one asked for; a tie goes up.

    Raises:
        ScheduleError: unknown name, or no number of microbatches helps because of `num_ranks`.
    """
    limits = _builder(name).limits
    problem = limits.ranks_problem(num_ranks)
    if problem is not None:
        raise ScheduleError(f"schedule {name}: {problem}")
    return limits.nearest_microbatches(num_ranks, num_microbatches)


def _builder(name: str) -> Builder:
    if name not in BUILDERS:
        close = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ScheduleError(f"unknown schedule {name!r}; expected one of {', '.join(BUILDERS)}{hint}")
    return BUILDERS[name]
