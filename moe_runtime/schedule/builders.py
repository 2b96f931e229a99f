"""The schedules by name. A new one is a builder file and a line in the table below."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.dualpipe import dualpipe
from moe_runtime.schedule.dualpipev import dualpipev
from moe_runtime.schedule.gpipe import gpipe
from moe_runtime.schedule.interleaved import interleaved
from moe_runtime.schedule.limits import Limits
from moe_runtime.schedule.one_f_one_b import one_f_one_b
from moe_runtime.schedule.placement import Placement, folded, looped, mirrored
from moe_runtime.schedule.single import single
from moe_runtime.schedule.zb1p import zb1p
from moe_runtime.schedule.zbv import zbv


@dataclass(frozen=True, slots=True)
class Builder:
    """A way to make a program, and the sizes for which it works.

    Args:
        make: program of (num_ranks, num_microbatches), and of num_chunks where `limits` leave a choice.
        place: its placement, of num_ranks, and of num_chunks where there is a choice.
    """

    make: Callable[..., Program]
    place: Callable[..., Placement]
    limits: Limits


BUILDERS = {
    "single": Builder(single, looped, Limits(max_ranks=1)),
    "gpipe": Builder(gpipe, looped, Limits()),
    "1f1b": Builder(one_f_one_b, looped, Limits()),
    "interleaved": Builder(interleaved, looped, Limits(num_chunks=2, min_chunks=2)),
    "zb1p": Builder(zb1p, looped, Limits()),
    "zbv": Builder(zbv, folded, Limits(num_chunks=2)),
    "dualpipe": Builder(
        dualpipe, mirrored, Limits(rank_multiple=2, microbatch_multiple=2, min_microbatches_per_rank=2)
    ),
    "dualpipev": Builder(dualpipev, folded, Limits(min_microbatches_per_rank=2, num_chunks=2)),
}


def build(name: str, num_ranks: int, num_microbatches: int, num_chunks: int | None = None) -> Program:
    """A pipeline program of computations alone; `passes.lower` adds the transfers.

    Args:
        name: a key of `BUILDERS`.
        num_ranks: P, pipeline ranks.
        num_microbatches: M, microbatches a step and data-parallel lane, over all directions.
        num_chunks: stages a rank and direction, 2 or more; `interleaved` alone leaves the choice. None
            takes the schedule's own number.

    Raises:
        ScheduleError: unknown name, or sizes that the schedule does not admit; names the nearest ones.
    """
    problem = admissible(name, num_ranks, num_microbatches, num_chunks)
    if problem is not None:
        raise ScheduleError(problem)
    builder = BUILDERS[name]
    return builder.make(num_ranks, num_microbatches, *_choice(builder, num_chunks))


def placement_of(name: str, num_ranks: int, num_chunks: int | None = None) -> Placement:
    """Where the stages of a schedule are: `placement[direction][stage]` is the pipeline rank.

    Raises:
        ScheduleError: unknown name, or a number of ranks or chunks that the schedule does not admit.
    """
    builder = _sized(name, num_ranks, num_chunks)
    return builder.place(num_ranks, *_choice(builder, num_chunks))


def admissible(name: str, num_ranks: int, num_microbatches: int, num_chunks: int | None = None) -> str | None:
    """Why `build` would refuse these sizes, in one line; None if it would not.

    Raises:
        ScheduleError: unknown name.
    """
    limits = _builder(name).limits
    problem = (
        limits.ranks_problem(num_ranks)
        or limits.chunks_problem(num_chunks)
        or limits.microbatches_problem(num_ranks, num_microbatches)
    )
    return None if problem is None else f"schedule {name}: {problem}"


def nearest_microbatches(
    name: str, num_ranks: int, num_microbatches: int, num_chunks: int | None = None
) -> int:
    """The admissible number of microbatches nearest to the one asked for; a tie goes up.

    Raises:
        ScheduleError: unknown name, or no number of microbatches helps because of `num_ranks` or
            `num_chunks`.
    """
    return _sized(name, num_ranks, num_chunks).limits.nearest_microbatches(num_ranks, num_microbatches)


def _sized(name: str, num_ranks: int, num_chunks: int | None) -> Builder:
    """The builder of a name, if it admits these ranks and chunks."""
    builder = _builder(name)
    problem = builder.limits.ranks_problem(num_ranks) or builder.limits.chunks_problem(num_chunks)
    if problem is not None:
        raise ScheduleError(f"schedule {name}: {problem}")
    return builder


def _choice(builder: Builder, num_chunks: int | None) -> tuple[int, ...]:
    """The argument for the number of chunks, for builders that take one."""
    if builder.limits.min_chunks is None:
        return ()
    return (builder.limits.num_chunks if num_chunks is None else num_chunks,)


def _builder(name: str) -> Builder:
    if name not in BUILDERS:
        if name == "searched":
            where = "moe_runtime.planner.search.search, or moe-runtime schedule searched"
            raise ScheduleError(
                f"schedule searched is made for costs, which build does not take; use {where}"
            )
        close = difflib.get_close_matches(name, BUILDERS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ScheduleError(f"unknown schedule {name!r}; expected one of {', '.join(BUILDERS)}{hint}")
    return BUILDERS[name]
