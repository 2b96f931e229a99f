"""FP8 in every kind of layout: the losses of one process, and casts of weights that are never stale."""

import pytest

from tests.dist.fp8_case import Trained, train_fp8
from tests.dist.layout_case import Case, compare_gradients
from tests.ranks import run_ranks, run_ranks_once

# Microbatches in powers of two, so that dividing by their number rounds nothing.
PP2_EP2 = ({"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}, 4)
TWO_HOP = ({"dp": 4, "ep": 4, "dispatcher": "two_hop", "ranks_per_node": 2}, 2)
ROUNDS = ({"dp": 2, "ep": 2, "max_rows": 20, "overflow": "rounds"}, 2)
FLOOD, IDLE = {0: 10.0, 1: 10.0}, {3: -10.0}


def _case(name: str, layout: tuple[dict, int], **extra: object) -> Case:
    return Case(name, *layout, precision="fp8", mtp_depth=1, **extra)  # type: ignore[arg-type]


GRADIENTS = {
    2: [
        _case("rounds, all tokens to one rank", ROUNDS, biases=FLOOD),
    ],
    4: [
        _case("dualpipe x ep, idle expert, recomputed", PP2_EP2, biases=IDLE, recompute=True),
        _case("two hops", TWO_HOP),
    ],
}


def _compare(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {case.name: compare_gradients(case, rank) for case in cases}


@pytest.mark.parametrize("world_size", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_losses_are_those_of_one_process_and_gradients_within_rounding(world_size: int) -> None:
    """Losses to FP32's rounding of their mean. Gradients as near as BF16's are between layouts: their sums
    begin in BF16, and tiles along tokens end elsewhere; with retiled gradients of rows, 3 % of the largest."""
    for found in run_ranks(_compare, world_size, GRADIENTS[world_size], timeout_s=200):
        for name, worst in found.items():
            exact = {what: worst.pop(what) for what in ("loss", "loss_mtp", "balance")}
            assert all(number < 1e-6 for number in exact.values()), f"{name}: {exact}"
            bad = {what: number for what, number in worst.items() if not number < 0.03}
            assert not bad, f"{name}: {bad}"


LAYOUTS = {1: ({}, 8), 2: ({"dp": 2, "ep": 2, "zero_stage": 2}, 4), 4: PP2_EP2}


def _train(rank: int, world_size: int) -> Trained:
    return train_fp8(_case("training", LAYOUTS[world_size]), rank)


def _train_and_forget_to_drop(rank: int, world_size: int) -> Trained:
    return train_fp8(_case("training", LAYOUTS[world_size]), rank, forgets=False)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_training_takes_the_same_course_in_every_layout(world_size: int) -> None:
    (alone,) = run_ranks_once(_train, 1)
    for trained in run_ranks_once(_train, world_size):
        for got, wanted in zip(trained.losses, alone.losses, strict=True):
            assert abs(got - wanted) < 2e-3 * wanted


@pytest.mark.slow
def test_weights_that_zero_wrote_are_cast_anew_and_it_shows_if_they_are_not() -> None:
    (trained,) = run_ranks_once(_train, 1)
    assert trained.after == trained.fresh
    (stale,) = run_ranks(_train_and_forget_to_drop, 1)
    assert stale.after is not None and abs(stale.after - stale.fresh) > 1e-3
