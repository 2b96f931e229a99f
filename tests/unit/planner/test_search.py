"""What the search promises: a correct program, within the cap, never longer than a built-in that fits."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.improve import improve, peak_live
from moe_runtime.planner.instance import Instance
from moe_runtime.planner.list_schedule import least_cap, list_schedule
from moe_runtime.planner.recipes import draw, follow, vary
from moe_runtime.planner.rivals import rivals
from moe_runtime.planner.search import SHAPES, Found, search, search_placement
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule import Program

COST = st.floats(0.1, 3.0)
EXCHANGE = st.sampled_from([0.0, 0.5, 1.0])
MODEL = st.builds(StageCosts, COST, COST, COST, EXCHANGE, EXCHANGE)
LITTLE = 0.05  # effort


def check_found(found: Found, cap: float | None) -> None:
    """All that must be so whatever was found."""
    assert found.program.name == "searched"
    schedule.lower(found.program)
    line = simulate(found.program, found.costs)
    assert line == found.timeline
    peak = max(line.peak_memory(rank) for rank in range(found.program.num_ranks))
    assert cap is None or peak <= cap + 1e-9
    assert found.bound <= found.makespan * (1 + 1e-9)
    assert found.rival is None or found.makespan <= found.rival.makespan * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    ranks=st.integers(1, 4),
    micros=st.integers(1, 8),
    model=MODEL,
    cap=st.sampled_from([None, 1.0, 1.5, 2.0, 4.0]),
    transfer=st.sampled_from([0.0, 0.2]),
    hidden=st.sampled_from([0.8, 1.0]),
)
def test_what_is_found_is_correct_and_no_longer_than_a_built_in(
    ranks: int, micros: int, model: StageCosts, cap: float | None, transfer: float, hidden: float
) -> None:
    found = search(ranks, micros, model, cap=cap, transfer=transfer, hidden=hidden, effort=LITTLE)
    check_found(found, cap)
    fitting = rivals(ranks, micros, model, cap=cap, transfer=transfer, hidden=hidden)
    assert (found.rival is None) == (not fitting)


@settings(max_examples=15, deadline=None)
@given(data=st.data(), shape=st.sampled_from(sorted(SHAPES)), transfer=st.sampled_from([0.0, 0.4]))
def test_unequal_stages_and_measured_pairs_can_be_searched(
    data: st.DataObject, shape: str, transfer: float
) -> None:
    placement = SHAPES[shape](2)
    count = len(placement[0])
    stages = tuple(data.draw(st.lists(MODEL, min_size=count, max_size=count)))
    costs = Costs(stages, transfer, pairs={(0, count - 1): data.draw(COST), (count - 1, 0): 1.0})
    cap = least_cap(Instance(placement, 6, costs))
    check_found(search_placement(placement, 6, costs, cap, LITTLE), cap)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    shape=st.sampled_from(sorted(SHAPES)),
    ranks=st.sampled_from([2, 4]),
    model=MODEL,
)
def test_numbers_say_what_the_simulator_says(seed: int, shape: str, ranks: int, model: StageCosts) -> None:
    """The search's own clock and memory are those of `simulate`, on list schedules of any kind."""
    rng = random.Random(seed)
    placement = SHAPES[shape](ranks)
    costs = Costs.split(model, ranks, len(placement[0]), rng.choice([0.0, 0.3, 2.0]), rng.choice([1.0, 0.7]))
    instance = Instance(placement, 6, costs)
    cap = rng.choice([least_cap(instance), 2.5, math.inf])
    recipe = vary(rng, instance, draw(rng, instance, cap), cap)
    rows = follow(instance, recipe, cap)
    if instance.evaluate(rows) == math.inf:
        return  # a pattern may wait for ever; the search passes it over
    program = instance.program(rows)
    line = simulate(program, costs)
    assert instance.evaluate(rows) == line.makespan
    assert [peak_live(instance, row) for row in rows] == [line.peak_memory(rank) for rank in range(ranks)]
    assert instance.rows(program) == rows
    better = improve(instance, rows, cap, changes=30, seed=seed)
    assert instance.evaluate(better) <= line.makespan


def test_the_least_cap_has_a_program_and_less_is_refused() -> None:
    for shape, place in SHAPES.items():
        found = search(4, 4, StageCosts(1.0, 1.0, 1.0), cap=1.0, shapes=[shape], effort=LITTLE)
        check_found(found, 1.0)
        assert found.shape == shape and found.program.placement == place(4)
    with pytest.raises(ScheduleError, match=r"memory of 0.9; the least is 1"):
        search(4, 4, StageCosts(1.0, 1.0, 1.0), cap=0.9)
    with pytest.raises(ScheduleError, match="unknown shape 'z'"):
        search(4, 4, StageCosts(1.0, 1.0, 1.0), shapes=["z"])


def test_the_same_question_has_the_same_answer() -> None:
    model = StageCosts(1.0, 1.3, 0.7, 0.4, 0.4)
    first, second = (search(4, 8, model, cap=3.0, effort=LITTLE) for _ in range(2))
    assert first.program == second.program


def test_no_effort_still_finds_a_program() -> None:
    check_found(search(3, 5, StageCosts(1.0, 1.0, 1.0), cap=1.0, effort=0.0), 1.0)
    costs = Costs((StageCosts(1.0, 1.0, 1.0, 0.5, 0.5),) * 6)
    check_found(search_placement(SHAPES["v"](3), 5, costs, 2.0, effort=0.0), 2.0)


def test_a_given_program_is_never_made_worse() -> None:
    program = schedule.build("dualpipe", 4, 8)
    costs = Costs((StageCosts(1.0, 1.0, 1.0, 1.0, 1.0),) * 4)
    found = search_placement(program.placement, 8, costs, effort=0.0, starts=[program])
    assert found.makespan <= simulate(program, costs).makespan


@pytest.mark.parametrize(
    ("ranks", "cap", "model", "makespan"),
    [
        (4, None, StageCosts(1.0, 1.0, 1.0), 25.5),  # zbv; both are at its bound
        (4, 2.0, StageCosts(1.0, 1.0, 1.0), 29.5),  # half the memory of 1f1b, and faster than its 33
    ],
)
def test_v_shapes_are_found_at_their_best(
    ranks: int, cap: float | None, model: StageCosts, makespan: float
) -> None:
    found = search(ranks, 2 * ranks, model, cap=cap, shapes=["v"], effort=0.3)
    assert found.makespan == makespan == found.bound


def test_pairs_are_used_where_exchange_is_as_long_as_computation() -> None:
    found = search(4, 8, StageCosts(1.0, 1.0, 1.0, 1.0, 1.0), effort=0.2)
    assert found.rival is not None and found.rival.name == "dualpipe"
    assert found.makespan < found.rival.makespan
    assert any("+" in str(entry) for row in found.program.rows for entry in row)


@pytest.mark.slow
def test_a_large_search_ends_with_a_shorter_program() -> None:
    found = search(16, 64, StageCosts(1.0, 1.0, 1.0, 1.0, 1.0), effort=0.5)
    check_found(found, None)
    assert Program.from_text(found.program.to_text()) == found.program
    assert found.rival is not None and found.makespan < found.rival.makespan


def test_rows_of_list_schedules_keep_to_any_cap() -> None:
    rng = random.Random(3)
    instance = Instance(SHAPES["w"](3), 7, Costs.split(StageCosts(1.0, 1.4, 0.6, 0.3, 0.3), 3, 12))
    for _ in range(40):
        recipe = draw(rng, instance, 1.0)
        if hasattr(recipe, "depth"):
            rows = list_schedule(instance, recipe, 1.0)
            assert instance.evaluate(rows) < math.inf
            assert max(peak_live(instance, row) for row in rows) <= 1 + 1e-9
