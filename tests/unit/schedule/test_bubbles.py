"""Bubbles on a clock equal the closed forms of the papers, where those forms hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.schedule import Kind
from tests.unit.schedule.clock import bubbles, run_clock

COST = st.floats(0.1, 4.0)


def costs(forward: float, input_grad: float, weight_grad: float) -> dict[Kind, float]:
    return {
        Kind.FORWARD: forward,
        Kind.BACKWARD: input_grad + weight_grad,
        Kind.INPUT_GRAD: input_grad,
        Kind.WEIGHT_GRAD: weight_grad,
    }


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 8), extra=st.integers(0, 8), forward=COST, backward=COST)
def test_bubble_of_1f1b_is_the_closed_form(ranks: int, extra: int, forward: float, backward: float) -> None:
    program = schedule.build("1f1b", ranks, ranks + extra)
    spans = run_clock(program, costs(forward, backward, 0.0), overlap=0.0)
    assert bubbles(spans) == pytest.approx([(ranks - 1) * (forward + backward)] * ranks)


# The closed form takes F = I and W <= F; beyond that domain the program is still right, but its
# bubble has to be simulated.
@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([2, 4, 6, 8]),
    extra=st.integers(0, 6),
    forward=COST,
    weight_share=st.floats(0.05, 1.0),
    pair_share=st.floats(0.0, 1.0),
)
def test_bubble_of_dualpipe_is_the_closed_form_in_its_domain(
    ranks: int, extra: int, forward: float, weight_share: float, pair_share: float
) -> None:
    weight = weight_share * forward
    backward = forward + weight
    pair = backward + pair_share * forward  # from perfect hiding of the forward to none
    program = schedule.build("dualpipe", ranks, 2 * ranks + 2 * extra)
    spans = run_clock(program, costs(forward, forward, weight), overlap=pair)
    expected = (ranks / 2 - 1) * (pair + backward - 3 * weight)
    middle = bubbles(spans)[ranks // 2 - 1]
    assert middle == pytest.approx(expected, abs=1e-9)
    assert max(bubbles(spans)) == pytest.approx(expected, abs=1e-9)


def test_a_single_rank_never_idles() -> None:
    assert bubbles(run_clock(schedule.build("single", 1, 5), costs(1.0, 1.0, 1.0), overlap=0.0)) == [0.0]
