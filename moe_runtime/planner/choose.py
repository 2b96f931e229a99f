"""Which program a run executes: the one asked for, or the shortest in the simulator.

    a name      that builder's
    searched    the search's, for the run's costs and memory cap; never longer than a builder's of the
                same placement
    auto        the shortest of all these: a builder's where the search finds nothing shorter

The placement of stages is settled before, with the layout; programs of other placements do not compete.

Costs are measured ones (a trace.json), typed ones, or reckoned: F, I and W each as long as the weights
that a token meets in a stage, and with expert parallelism exchanges as long as the computation of their
pass, the 1:1 of the report. Ref: DSV3 §3.2.1.
"""

from dataclasses import dataclass
from pathlib import Path

from moe_runtime.config.counts import stage_loads
from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import LayoutConfig, ModelConfig
from moe_runtime.errors import ConfigError, ScheduleError
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.costs_text import read_costs
from moe_runtime.planner.measured_costs import measured_costs, whole_model
from moe_runtime.planner.search import Found, search_placement
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.trace import read_trace
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.builders import BUILDERS, admissible, build, placement_of

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Choice:
    """The program of a run, without transfers.

    Args:
        said: why it was chosen, in one line; None where the config named it.
    """

    program: Program
    said: str | None = None


def choose(model: ModelConfig, wanted: LayoutConfig, layout: ResolvedLayout, num_microbatches: int) -> Choice:
    """The program for a number of microbatches a lane; a search takes seconds, alike everywhere.

    Args:
        wanted: the layout section of the config.
        layout: what it resolves to.

    Raises:
        ConfigError: `costs` cannot be read, or no program keeps to `max_live`.
    """
    if layout.schedule not in ("auto", "searched"):
        return Choice(build(layout.schedule, layout.pp, num_microbatches, wanted.chunks))
    costs = run_costs(model, wanted, layout)
    cap = wanted.max_live
    fitting = _fitting(layout, num_microbatches, costs, cap)
    starts = [program for _, program in fitting]
    try:
        found = search_placement(layout.placement, num_microbatches, costs, cap, starts=starts)
    except ScheduleError as error:
        raise ConfigError(f"layout.max_live: {error}; allow that, or more pipeline ranks") from error
    return _pick(found, fitting, may_be_named=layout.schedule == "auto")


def run_costs(model: ModelConfig, wanted: LayoutConfig, layout: ResolvedLayout) -> Costs:
    """Costs of the layout's stages: measured, typed, or reckoned from the model.

    Raises:
        ConfigError: `costs` is neither a readable trace nor text such as F=1,B=2.
    """
    if wanted.costs is None:
        return reckoned_costs(model, layout)
    if "=" in wanted.costs:
        return read_costs(wanted.costs, "layout.costs").of(layout.pp, layout.num_stages)
    try:
        trace = read_trace(Path(wanted.costs))
        costs = measured_costs(trace)
    except ConfigError as error:
        raise ConfigError(f"layout.costs: expected F=1,B=2 and the like, or a trace.json; {error}") from None
    if trace.program.placement == layout.placement:
        return costs
    shared = whole_model(costs, layout.pp)
    return Costs.split(shared, layout.pp, layout.num_stages, costs.transfer, costs.hidden)


def reckoned_costs(model: ModelConfig, layout: ResolvedLayout) -> Costs:
    """Costs in units of the computation of an F in one pp-th of the model."""
    layers, first, last = stage_loads(model)
    loads = [sum(layers[n] for n in held) for held in layout.layers]
    loads[0] += first
    loads[-1] += last
    unit, exchanges = sum(loads) / layout.pp, layout.ep > 1
    memory = layout.pp / model.num_layers

    def stage(load: float, num_layers: int) -> StageCosts:
        forward = load / unit
        comm = forward if exchanges else 0.0
        return StageCosts(forward, forward, forward, comm, 2 * comm, live=num_layers * memory)

    return Costs(tuple(stage(load, len(held)) for load, held in zip(loads, layout.layers, strict=True)))


def _fitting(
    layout: ResolvedLayout, num_microbatches: int, costs: Costs, cap: float | None
) -> list[tuple[float, Program]]:
    """Builders' programs of this placement within the cap, with their makespan, the shortest first."""
    programs = [
        build(name, layout.pp, num_microbatches)
        for name in BUILDERS
        if admissible(name, layout.pp, num_microbatches) is None
        and placement_of(name, layout.pp) == layout.placement
    ]
    timed = [(simulate(program, costs), program) for program in programs]
    fitting = [
        (timeline.makespan, program)
        for timeline, program in timed
        if cap is None or max(map(timeline.peak_memory, range(layout.pp))) <= cap + _SLACK
    ]
    return sorted(fitting, key=lambda each: each[0])


def _pick(found: Found, fitting: list[tuple[float, Program]], may_be_named: bool) -> Choice:
    gap = f"{found.gap:.1%} above the lower bound"
    if not fitting:
        return Choice(found.program, f"schedule searched: no builder's program fits layout.max_live; {gap}")
    makespan, named = fitting[0]
    if may_be_named and makespan <= found.makespan * (1 + _SLACK):
        return Choice(named, f"schedule auto: {named.name}; no search beats it; {gap}")
    ratio = found.makespan / makespan
    said = f"schedule searched: {ratio:.3f} of the time of {named.name} in the simulator; {gap}"
    return Choice(found.program, said)
