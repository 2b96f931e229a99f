"""The simulator against closed forms, against the checker, and on programs small enough to reckon."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Timeline
from moe_runtime.schedule import Program

COST = st.floats(0.1, 4.0)
NAMES = sorted(set(schedule.BUILDERS) - {"single"})


def timeline(text: str, costs: Costs) -> Timeline:
    return simulate(Program.from_text(text), costs)


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 8), extra=st.integers(0, 8), forward=COST, input_grad=COST, weight_grad=COST)
def test_bubble_of_1f1b_is_the_closed_form(
    ranks: int, extra: int, forward: float, input_grad: float, weight_grad: float
) -> None:
    program = schedule.build("1f1b", ranks, ranks + extra)
    line = simulate(program, Costs((StageCosts(forward, input_grad, weight_grad),) * ranks))
    expected = (ranks - 1) * (forward + input_grad + weight_grad)
    assert [line.bubble(rank) for rank in range(ranks)] == pytest.approx([expected] * ranks)
    assert line.makespan == pytest.approx((ranks - 1 + ranks + extra) * (forward + input_grad + weight_grad))


# (PP/2-1)(F&B + B - 3W) holds for F = I and W <= F; see tests/unit/schedule/test_bubbles.py.
@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([2, 4, 6, 8]),
    extra=st.integers(0, 6),
    forward=COST,
    weight_share=st.floats(0.05, 1.0),
    saved=st.floats(0.0, 1.0),
)
def test_bubble_of_dualpipe_is_the_closed_form_in_its_domain(
    ranks: int, extra: int, forward: float, weight_share: float, saved: float
) -> None:
    weight = weight_share * forward
    backward = forward + weight
    pair = backward + (1 - saved) * forward
    program = schedule.build("dualpipe", ranks, 2 * ranks + 2 * extra)
    measured = {(a, b): pair for a in range(ranks) for b in range(ranks)}
    line = simulate(program, Costs((StageCosts(forward, forward, weight),) * ranks, pairs=measured))
    expected = (ranks / 2 - 1) * (pair + backward - 3 * weight)
    assert max(line.bubble(rank) for rank in range(ranks)) == pytest.approx(expected, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(NAMES), half=st.integers(1, 3), extra=st.integers(0, 4), forward=COST, comm=COST)
def test_memory_is_what_the_checker_counts_and_transfers_change_nothing(
    name: str, half: int, extra: int, forward: float, comm: float
) -> None:
    program = schedule.build(name, 2 * half, schedule.nearest_microbatches(name, 2 * half, 4 * half + extra))
    stage = StageCosts(forward, 1.0, 0.5, comm, 0.5 * comm)
    costs = Costs((stage,) * program.num_stages, transfer=0.1, hidden=0.9)
    line = simulate(program, costs)
    peaks = tuple(line.peak_memory(rank) for rank in range(program.num_ranks))
    assert peaks == program.check().peak_live
    assert all(abs(changes[-1][1]) < 1e-9 for changes in line.memory)
    assert simulate(schedule.lower(program), costs) == line


def test_an_overlap_exposes_the_exchange_that_no_computation_hides() -> None:
    text = "x microbatches=2 placement=0\n0: 0F0 0F1+0B0 0B1"
    line = timeline(text, Costs((StageCosts(2.0, 1.0, 1.0, 1.0, 2.0),)))
    assert [(span.start, span.end) for span in line.rows[0]] == [(0, 3), (3, 7), (7, 11)]
    assert [span.exposed for span in line.rows[0]] == [1, 0, 2]
    half = timeline(text, Costs((StageCosts(2.0, 1.0, 1.0, 1.0, 2.0),), hidden=0.5))
    assert half.makespan == 12.5 and half.exposed(0) == 4.5 and half.comm(0) == 6
    measured = timeline(text, Costs((StageCosts(2.0, 1.0, 1.0, 1.0, 2.0),), pairs={(0, 0): 4.25}))
    assert measured.makespan == 11.25 and measured.rows[0][1].exposed == 0.25


def test_a_transfer_delays_its_receiver_and_not_a_sender_that_computes() -> None:
    text = "x microbatches=2 placement=0,1\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1B0 1F1 1B1"
    line = timeline(text, Costs((StageCosts(1.0, 1.0, 0.0),) * 2, transfer=0.5))
    assert [span.start for span in line.rows[0]] == [0, 1, 4, 6]
    assert [span.start for span in line.rows[1]] == [1.5, 2.5, 3.5, 4.5]


def test_messages_leave_one_at_a_time() -> None:
    text = "x microbatches=2 placement=0,1\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1F1 1B0 1B1"
    line = timeline(text, Costs((StageCosts(1.0, 1.0, 0.0),) * 2, transfer=3.0))
    assert [span.start for span in line.rows[1]][:2] == [4, 7]


@pytest.mark.parametrize(("compute", "held_up"), [(3.0, 0.0), (2.0, 0.0), (1.5, 0.5), (0.5, 1.5)])
def test_a_message_holds_an_entry_up_only_where_the_lane_is_short(compute: float, held_up: float) -> None:
    text = "x microbatches=2 placement=0,1\n0: 0F0 0F1 0B0 0B1\n1: 1F0 1F1 1B0 1B1"
    line = timeline(text, Costs((StageCosts(compute, 1.0, 0.0, forward_comm=1.0),) * 2, transfer=2.0))
    second = line.rows[0][1]
    assert second.end - second.start == compute + 1 + held_up
    assert second.exposed == 1


def test_stages_of_one_rank_send_nothing() -> None:
    text = "x microbatches=1 placement=0,0\n0: 0F0 1F0 1B0 0B0"
    assert timeline(text, Costs((StageCosts(1.0, 1.0, 1.0),) * 2, transfer=9.0)).makespan == 6


def test_what_can_not_be_simulated_is_refused() -> None:
    program = schedule.build("1f1b", 2, 2)
    with pytest.raises(ScheduleError, match="expected costs of 2 stages, got costs of 1"):
        simulate(program, Costs((StageCosts(1, 1, 1),)))
    stuck = "x microbatches=1 placement=0,1\n0: 0B0 0F0\n1: 1F0 1B0"
    with pytest.raises(ScheduleError, match="deadlock: rank 0, entry 0"):
        timeline(stuck, Costs((StageCosts(1, 1, 1),) * 2))
