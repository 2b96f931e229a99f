"""Intervals hold what they say: known values, pairs, and how often they cover the truth."""

import math

import numpy as np
import pytest

from moe_runtime.evaluation.intervals import bootstrap_ratio, mean_interval, paired_interval, share_interval


def test_three_seeds_pay_for_learning_their_spread():
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert not found.resolved


def test_pairs_leave_out_what_seeds_share():
    base = [1.0, 5.0, 9.0]
    better = [value - 0.1 - 0.001 * number for number, value in enumerate(base)]
    assert paired_interval(better, base).resolved
    assert not (mean_interval(better).high < mean_interval(base).low)


def test_one_value_resolves_nothing():
    assert not mean_interval([3.0]).resolved
    assert not bootstrap_ratio([3.0], [2.0]).resolved
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])


def test_identical_pairs_are_not_resolved():
    assert not paired_interval([1.0, 2.0], [1.0, 2.0]).resolved


def _coverage(interval_of, truth: float) -> float:
    found = [interval_of(np.random.default_rng(trial)) for trial in range(200)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


def test_t_intervals_of_three_cover_the_truth_19_times_in_20():
    covered = _coverage(lambda random: mean_interval(list(random.normal(1.0, 0.3, 3))), 1.0)
    assert 0.92 < covered < 0.98


def test_bootstrap_over_documents_of_unequal_size_covers_the_truth():
    def one(random):
        sizes = random.lognormal(3.0, 1.0, 60)
        return bootstrap_ratio(list(sizes * random.normal(2.0, 0.4, 60)), list(sizes), rounds=200)

    assert 0.88 < _coverage(one, 2.0) < 0.98


def test_documents_without_bytes_do_not_divide_by_zero():
    assert math.isfinite(bootstrap_ratio([1.0, 2.0], [0.0, 4.0]).high)
    with pytest.raises(ValueError, match="sum above 0"):
        bootstrap_ratio([1.0], [0.0])


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0)],  # Wilson's, from tables
)
def test_a_share_has_an_interval_at_its_ends_too(right: int, asked: int, low: float, high: float) -> None:
    found = share_interval([1.0] * right + [0.0] * (asked - right))
    assert (found.mean, found.low, found.high) == pytest.approx((right / asked, low, high), abs=1e-4)
