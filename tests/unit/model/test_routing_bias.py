"""The routing bias moves by the sign rule, from exact counts."""

import pytest
import torch

from moe_runtime.model.router import update_bias


def moved(counts: list[int], gamma: float = 0.5) -> list[float]:
    bias = torch.zeros(len(counts))
    update_bias(bias, torch.tensor(counts), gamma)
    return bias.tolist()


def test_underloaded_experts_rise_overloaded_fall_and_a_tie_stands_still() -> None:
    assert moved([1, 2, 3]) == [0.5, 0.0, -0.5]
    assert moved([4, 4, 4, 4]) == [0.0] * 4
    assert moved([0, 0, 0, 0]) == [0.0] * 4


def test_steps_are_not_centred() -> None:
    assert moved([0, 4, 4, 4]) == [0.5, -0.5, -0.5, -0.5]


def test_a_mean_that_is_no_whole_number_ties_with_nobody() -> None:
    assert moved([1, 1, 2]) == [0.5, 0.5, -0.5]


@pytest.mark.parametrize("large", [2**24, 2**40])
def test_counts_beyond_fp32_are_compared_exactly(large: int) -> None:
    """At 2^40 FP32 is blind to a difference of 65,536; one token decides here."""
    assert moved([large - 1, large, large + 1, large]) == [0.5, 0.0, -0.5, 0.0]
    many = [large] * 256
    many[3], many[200] = large + 1, large - 1
    got = moved(many)
    assert got[3] == -0.5 and got[200] == 0.5 and got.count(0.0) == 254


def test_steps_add_up_in_place_in_fp32() -> None:
    bias = torch.tensor([1.0, -1.0])
    for _ in range(1000):
        update_bias(bias, torch.tensor([1, 3]), 0.001)
    assert bias.dtype == torch.float32
    assert bias.tolist() == pytest.approx([2.0, -2.0], rel=1e-4)


def test_gamma_zero_freezes_the_bias() -> None:
    assert moved([1, 5], gamma=0.0) == [0.0, 0.0]
