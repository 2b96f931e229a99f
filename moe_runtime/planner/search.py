"""A program made for given costs and a given memory, where the hand-made ones are made for no costs.

The problem is a job shop: microbatches are the jobs, ranks the machines; on top of it come memory, and
pairs that take less time together than one after the other. It is NP-hard, so the search is heuristic;
what is proved is that its result is a correct program, within the cap, never longer than a built-in
that fits, and how far from the best it can be at most (`bound.py`).

    for each shape    explore: follow recipes, by list scheduling (list_schedule.py) or by repeating
                      one microbatch's way (pattern.py); built-in programs of the shape are taken in too
    for the best      explore further, then polish by local search (improve.py)

Shapes are the ways to lay stages on ranks. More stages a rank fill the pipeline sooner, and cost more
messages. `mirrored` holds every parameter twice; leave it out where that does not fit.

Rejected: an exact solver, which would be a dependency with no promise of when it ends; and learning
priorities, which needs a training run for what a few hundred random draws give.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_runtime.errors import ScheduleError
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.hunt import Hunt
from moe_runtime.planner.instance import Instance, Placement
from moe_runtime.planner.list_schedule import least_cap
from moe_runtime.planner.rivals import Rival, rivals
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Timeline
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.placement import folded, looped, mirrored

_SLACK = 1e-9
_STEPS = 20_000.0  # of search for each F, I and W of a program with one stage a rank, at effort 1
_FINALISTS = 3

SHAPES: dict[str, Callable[[int], Placement]] = {
    "straight": looped,
    "loop": lambda ranks: looped(ranks, 2),
    "loop4": lambda ranks: looped(ranks, 4),
    "v": folded,
    "w": lambda ranks: (folded(ranks)[0] * 2,),
    "mirrored": mirrored,
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Args:
        program: checked, without transfers; its name is "searched".
        costs: of its stages.
        timeline: of its simulation.
        bound: no program of any placement that was searched can be shorter, within the cap.
        rival: the shortest built-in of the shapes searched that fits the cap; None if there is none, or if
            one placement was searched.
    """

    program: Program
    costs: Costs
    timeline: Timeline
    bound: float
    rival: Rival | None = None

    @property
    def makespan(self) -> float:
        return self.timeline.makespan

    @property
    def gap(self) -> float:
        """By how much of the bound the makespan exceeds it; the best program may be that much shorter."""
        return max(0.0, self.makespan / self.bound - 1)

    @property
    def shape(self) -> str:
        """The key of `SHAPES` that the program's placement has; "other" for any other."""
        placement = self.program.placement
        shapes = (name for name, make in SHAPES.items() if make(self.program.num_ranks) == placement)
        return next(shapes, "other")


def search(
    num_ranks: int,
    num_microbatches: int,
    model: StageCosts,
    *,
    cap: float | None = None,
    shapes: Sequence[str] = tuple(SHAPES),
    transfer: float = 0.0,
    hidden: float = 1.0,
    effort: float = 1.0,
) -> Found:
    """The shortest program found for a model that can be cut into equal stages at will.

    Args:
        model: costs of one P-th of the model; see `Costs.split`.
        cap: most live memory on a rank, in units of `model.live`; None for any.
        shapes: keys of `SHAPES`; those that the sizes or the cap do not admit are passed over. All
            together have the placements of all built-in schedules.
        transfer, hidden: as in `Costs`.
        effort: 1 for a second with 4 ranks and 16 microbatches, about a minute with 16 and 64.

    Raises:
        ScheduleError: no shape has a program within the cap; says the least cap.
    """
    limit = math.inf if cap is None else cap
    placements = _placements(num_ranks, num_microbatches, shapes)
    built_in = rivals(num_ranks, num_microbatches, model, cap=cap, transfer=transfer, hidden=hidden)
    best_first = [rival for rival in built_in if rival.program.placement in placements]
    instances = [
        Instance(place, num_microbatches, Costs.split(model, num_ranks, len(place[0]), transfer, hidden))
        for place in placements
    ]
    hunts = [Hunt(each, limit) for each in instances if least_cap(each) <= limit + _SLACK]
    if not hunts:
        raise _too_little(limit, instances)
    for hunt in hunts:
        for rival in best_first:
            if rival.program.placement == hunt.instance.placement:
                hunt.add(rival.program)
    _hunt(hunts, effort * _STEPS * 3 * num_ranks * num_microbatches)
    best = min(hunts, key=lambda hunt: hunt.makespan)
    bound = min(hunt.bound for hunt in hunts)
    return _found(best, bound, best_first[0] if best_first else None)


def search_placement(
    placement: Placement,
    num_microbatches: int,
    costs: Costs,
    cap: float | None = None,
    effort: float = 1.0,
    starts: Sequence[Program] = (),
) -> Found:
    """The shortest program found for stages that stay where they are, each with its own costs.

    Args:
        placement: `placement[direction][stage]` is the pipeline rank.
        cap: most live memory on a rank, in units of `StageCosts.live`; None for any.
        starts: programs of this placement, without transfers; the result is no longer than those that fit.

    Raises:
        ScheduleError: no program is within the cap; says the least cap.
    """
    limit = math.inf if cap is None else cap
    instance = Instance(placement, num_microbatches, costs)
    if least_cap(instance) > limit + _SLACK:
        raise _too_little(limit, [instance])
    hunt = Hunt(instance, limit)
    for program in starts:
        hunt.add(program)
    _hunt([hunt], effort * _STEPS * 3 * instance.num_ranks * num_microbatches)
    return _found(hunt, hunt.bound, None)


def _placements(num_ranks: int, num_microbatches: int, shapes: Sequence[str]) -> dict[Placement, None]:
    """The placements to search, each once, in order."""
    unknown = [shape for shape in shapes if shape not in SHAPES]
    if unknown:
        raise ScheduleError(f"search: unknown shape {unknown[0]!r}; expected some of {', '.join(SHAPES)}")
    places = (SHAPES[shape](num_ranks) for shape in shapes if shape != "mirrored" or num_ranks % 2 == 0)
    return {place: None for place in places if num_microbatches % len(place) == 0}


def _hunt(hunts: list[Hunt], steps: float) -> None:
    """Spend so many steps on the hunts: a third on all alike, the rest on the most promising."""
    starters = _open(hunts)
    for hunt in starters:
        hunt.explore(max(1.0, steps / (3 * len(starters))))  # one recipe at least
    for left in range(_FINALISTS, 0, -1):
        finalists = sorted(_open(hunts), key=lambda hunt: hunt.makespan)[:left]
        for hunt in finalists:
            share = steps * 2 / 3 / (_FINALISTS * len(finalists))
            hunt.explore(0.5 * share)
            hunt.polish(0.5 * share)


def _open(hunts: list[Hunt]) -> list[Hunt]:
    """The hunts that might still find something better than the best of all."""
    best = min(hunt.makespan for hunt in hunts)
    return [hunt for hunt in hunts if hunt.bound < best - _SLACK]


def _found(hunt: Hunt, bound: float, rival: Rival | None) -> Found:
    program = hunt.instance.program(hunt.best())
    program.check()
    return Found(program, hunt.instance.costs, simulate(program, hunt.instance.costs), bound, rival)


def _too_little(cap: float, instances: Sequence[Instance]) -> ScheduleError:
    least = min(map(least_cap, instances))
    return ScheduleError(f"search: no program keeps to a memory of {cap:g}; the least is {least:g}")
