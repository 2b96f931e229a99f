"""Schedules at the report's own numbers. Ref: DSV3 §4.2."""

import math
from itertools import pairwise

import pytest

from moe_runtime.config.schema import RecipeConfig
from moe_runtime.optim.schedule import bias_gamma_at, lr_at, mtp_lambda_at

T, B = 10**12, 10**9
PEAK = 2.2e-4
V3 = RecipeConfig(
    warmup_steps=2000,
    constant_until_tokens=10 * T,
    cosine_tokens=4300 * B,
    min_lr_ratio=0.1,
    tail_tokens=333 * B,
    final_lr_ratio=7.3e-6 / PEAK,
    bias_gamma=0.001,
    bias_until_tokens=14300 * B,
    mtp_lambda=0.3,
    mtp_lambda_final=0.1,
    mtp_switch_tokens=10 * T,
)


@pytest.mark.parametrize(
    ("step", "tokens", "expected"),
    [
        (0, 0, PEAK / 2000),
        (999, 12 * B, PEAK / 2),
        (1999, 25 * B, PEAK),
        (2000, 26 * B, PEAK),
        (10**6, 10 * T - 1, PEAK),
        (10**6, 10 * T, PEAK),
        (10**6, 10 * T + 2150 * B, (PEAK + 2.2e-5) / 2),
        (10**6, 10 * T + 1075 * B, 2.2e-5 + (PEAK - 2.2e-5) * (1 + math.sqrt(0.5)) / 2),
        (10**6, 14300 * B - 1, 2.2e-5),
        (10**6, 14300 * B, 2.2e-5),
        (10**6, 14633 * B - 1, 2.2e-5),
        (10**6, 14633 * B, 7.3e-6),
        (10**6, 14800 * B, 7.3e-6),
    ],
)
def test_learning_rate_has_the_five_segments_of_the_report(step: int, tokens: int, expected: float) -> None:
    assert lr_at(V3, PEAK, step, tokens) == pytest.approx(expected, rel=1e-9)


def test_learning_rate_never_rises_after_warmup() -> None:
    rates = [lr_at(V3, PEAK, 10**6, tokens) for tokens in range(0, 15 * T, 50 * B)]
    assert all(later <= earlier for earlier, later in pairwise(rates))


def test_defaults_warm_up_and_stay_at_the_peak() -> None:
    recipe = RecipeConfig(warmup_steps=4)
    assert [lr_at(recipe, 1.0, step, step * 1000) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert lr_at(RecipeConfig(warmup_steps=0), 1.0, 0, 0) == 1.0


def test_routing_bias_stands_still_for_the_last_500b_tokens() -> None:
    assert bias_gamma_at(V3, 0) == bias_gamma_at(V3, 14300 * B - 1) == 0.001
    assert bias_gamma_at(V3, 14300 * B) == 0.0
    assert bias_gamma_at(RecipeConfig(), 10**18) == 0.001


def test_mtp_weight_falls_at_ten_trillion_tokens() -> None:
    assert mtp_lambda_at(V3, 10 * T - 1) == 0.3
    assert mtp_lambda_at(V3, 10 * T) == 0.1
    assert mtp_lambda_at(RecipeConfig(), 10**18) == 0.3
