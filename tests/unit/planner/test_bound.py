"""No program on the clock is shorter than the bound, and where the bound is sharp it is reached."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.planner.bound import lower_bound
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.instance import Instance
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule import BUILDERS, Program

COST = st.floats(0.0, 3.0)
STAGE = st.builds(StageCosts, COST, COST, COST, COST, COST)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A built-in program of some size, its backwards cut in two or not."""
    name = draw(st.sampled_from(sorted(set(BUILDERS) - {"single"})))
    ranks = draw(st.sampled_from([2, 4, 6] if name == "dualpipe" else [1, 2, 3, 4, 5]))
    micros = schedule.nearest_microbatches(name, ranks, draw(st.integers(1, 12)))
    program = schedule.build(name, ranks, micros)
    return schedule.split_backward(program) if draw(st.booleans()) else program


@settings(max_examples=150, deadline=None)
@given(program=programs(), data=st.data(), transfer=st.sampled_from([0.0, 0.3]), hidden=st.floats(0.0, 1.0))
def test_no_program_is_shorter(program: Program, data: st.DataObject, transfer: float, hidden: float) -> None:
    count = program.num_stages
    stages = tuple(data.draw(st.lists(STAGE, min_size=count, max_size=count)))
    pairs = data.draw(st.dictionaries(st.tuples(*[st.integers(0, count - 1)] * 2), st.floats(0.1, 9.0)))
    costs = Costs(stages, transfer, hidden, pairs)
    instance = Instance(program.placement, program.num_microbatches, costs)
    line = simulate(program, costs)
    peak = max(line.peak_memory(rank) for rank in range(program.num_ranks))
    assert lower_bound(instance, peak) <= line.makespan * (1 + 1e-9) + 1e-9
    assert lower_bound(instance) <= lower_bound(instance, peak) + 1e-9


@pytest.mark.parametrize("microbatches", [8, 16])
def test_zbv_at_equal_costs_is_as_short_as_can_be(microbatches: int) -> None:
    program = schedule.build("zbv", 4, microbatches)
    costs = Costs.split(StageCosts(1.0, 1.0, 1.0), 4, 8)
    assert simulate(program, costs).makespan == lower_bound(Instance(program.placement, microbatches, costs))


def test_one_rank_takes_its_work() -> None:
    costs = Costs((StageCosts(1.0, 2.0, 3.0, 0.5, 0.25),))
    assert lower_bound(Instance(((0,),), 5, costs), 1.0) == pytest.approx(5 * 6.75)
