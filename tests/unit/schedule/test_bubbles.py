"""Bubbles on a clock equal the closed forms of the papers, where those forms hold."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.schedule import Kind, Program
from tests.unit.schedule.clock import bubbles, run_clock

COST = st.floats(0.1, 4.0)


def costs(forward: float, input_grad: float, weight_grad: float) -> dict[Kind, float]:
    return {
        Kind.FORWARD: forward,
        Kind.BACKWARD: input_grad + weight_grad,
        Kind.INPUT_GRAD: input_grad,
        Kind.WEIGHT_GRAD: weight_grad,
    }


def bubbles_of(program: Program, cost: dict[Kind, float], overlap: float = 0.0) -> list[float]:
    return bubbles(run_clock(program, cost, overlap))


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    ranks=st.integers(1, 8),
    extra=st.integers(0, 8),
    forward=COST,
    backward=COST,
)
def test_bubble_of_gpipe_and_1f1b_is_the_closed_form(
    name: str, ranks: int, extra: int, forward: float, backward: float
) -> None:
    program = schedule.build(name, ranks, ranks + extra)
    expected = (ranks - 1) * (forward + backward)
    assert bubbles_of(program, costs(forward, backward, 0.0)) == pytest.approx([expected] * ranks)


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.integers(1, 6), rounds=st.integers(1, 4), chunks=st.integers(2, 4), forward=COST, backward=COST
)
def test_bubble_of_interleaved_is_a_chunks_share_of_1f1b(
    ranks: int, rounds: int, chunks: int, forward: float, backward: float
) -> None:
    thin = schedule.build("interleaved", ranks, rounds * ranks, chunks)
    thick = schedule.build("1f1b", ranks, rounds * ranks)
    expected = bubbles_of(thick, costs(chunks * forward, chunks * backward, 0.0))
    found = bubbles_of(thin, costs(forward, backward, 0.0))
    assert found == pytest.approx([each / chunks for each in expected], abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 8),
    extra=st.integers(0, 8),
    forward=COST,
    input_grad=COST,
    weight_share=st.floats(0.05, 1.0),
)
def test_bubble_of_zb1p_is_the_closed_form_in_its_domain(
    ranks: int, extra: int, forward: float, input_grad: float, weight_share: float
) -> None:
    weight = weight_share * min(forward, input_grad)
    found = bubbles_of(schedule.build("zb1p", ranks, ranks + extra), costs(forward, input_grad, weight))
    assert found == pytest.approx([(ranks - 1) * (forward + input_grad - weight)] * ranks, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(ranks=st.integers(1, 10), extra=st.integers(0, 12), cost=COST)
def test_zbv_idles_only_until_the_last_rank_has_its_first_microbatch(
    ranks: int, extra: int, cost: float
) -> None:
    program = schedule.build("zbv", ranks, 2 * ranks - 1 + extra)
    assert bubbles_of(program, costs(cost, cost, cost)) == pytest.approx([(ranks - 1) * cost] * ranks)


# The closed form takes F = I and W <= F; beyond that domain the program is still right, but its
# bubble has to be simulated. The two hold it at the turn: the middle ranks, or the last rank of the V.
@settings(max_examples=60, deadline=None)
@given(
    places=st.integers(1, 4),
    folded=st.booleans(),
    extra=st.integers(0, 6),
    forward=COST,
    weight_share=st.floats(0.05, 1.0),
    pair_share=st.floats(0.0, 1.0),
)
def test_bubble_of_dualpipe_and_dualpipev_is_the_closed_form_in_its_domain(
    places: int, folded: bool, extra: int, forward: float, weight_share: float, pair_share: float
) -> None:
    weight = weight_share * forward
    backward = forward + weight
    pair = backward + pair_share * forward  # from perfect hiding of the forward to none
    if folded:
        program = schedule.build("dualpipev", places, 2 * places + extra)
    else:
        program = schedule.build("dualpipe", 2 * places, 4 * places + 2 * extra)
    found = bubbles_of(program, costs(forward, forward, weight), overlap=pair)
    expected = (places - 1) * (pair + backward - 3 * weight)
    assert found[places - 1] == pytest.approx(expected, abs=1e-9)
    assert max(found) == pytest.approx(expected, abs=1e-9)


def test_a_single_rank_never_idles() -> None:
    assert bubbles(run_clock(schedule.build("single", 1, 5), costs(1.0, 1.0, 1.0), overlap=0.0)) == [0.0]
