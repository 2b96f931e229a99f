"""Curves in few points: extremes stay, and folding bit by bit is folding at once."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.metrics.report import folded
from moe_runtime.metrics.report.folded import EXACT, FEW, Folded


def _curve(values: list[float], first: int = 1) -> Folded:
    curve = Folded()
    for step, value in enumerate(values, first):
        curve.add(step, value)
    return curve


def test_a_short_curve_is_kept_whole_to_the_digit() -> None:
    values = np.random.default_rng(0).random(EXACT).tolist()
    steps, kept = _curve(values).points()
    assert steps.tolist() == list(range(1, EXACT + 1))
    assert kept.tolist() == values


def test_a_long_curve_keeps_every_extreme_at_its_step() -> None:
    values = np.random.default_rng(1).normal(size=50_000)
    values[33_333], values[44_444] = 99.0, -99.0
    curve = _curve(values.tolist())
    steps, kept = curve.points()
    assert len(steps) <= 2 * FEW + 1
    assert kept[steps == 33_334] == [99.0] and kept[steps == 44_445] == [-99.0]
    for start in range(0, 50_000, curve.width):  # buckets are of steps, which begin at 1
        own = values[max(0, start - 1) : start + curve.width - 1]
        inside = kept[(steps >= start) & (steps < start + curve.width)]
        assert inside.min() == own.min() and inside.max() == own.max()


def test_a_value_that_is_not_finite_stays_as_a_gap() -> None:
    values = [1.0] * 20_000
    values[7_000] = math.nan
    curve = _curve(values)
    steps, kept = curve.points()
    assert steps[np.isnan(kept)].tolist() == [7_001]
    assert (curve.stats.num_bad, curve.stats.first_bad) == (1, 7_001)


def test_the_last_point_is_always_there() -> None:
    values = [float(abs(step - 5_000)) for step in range(9_999)] + [3.0]
    steps, kept = _curve(values).points()
    assert (steps[-1], kept[-1]) == (10_000, 3.0)


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.floats(-10, 10) | st.just(math.nan), min_size=1, max_size=400),
    looks=st.lists(st.integers(0, 400), max_size=5),
    gap=st.integers(1, 50),
)
def test_looking_in_between_changes_nothing(values: list[float], looks: list[int], gap: int) -> None:
    with pytest.MonkeyPatch.context() as patch:  # small limits, so that few points are folded often
        patch.setattr(folded, "EXACT", 32)
        patch.setattr(folded, "FEW", 16)
        patch.setattr(folded, "_WAITING", 7)
        once, often = Folded(), Folded()
        for place, value in enumerate(values):
            once.add(1 + place * gap, value)
            often.add(1 + place * gap, value)
            if place in looks:
                often.points()
        for a, b in zip(once.points(), often.points(), strict=True):
            np.testing.assert_array_equal(a, b)
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        kept = once.points()[1]
        assert np.nanmin(kept) == min(finite) and np.nanmax(kept) == max(finite)
