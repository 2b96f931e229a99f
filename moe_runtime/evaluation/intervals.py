"""How sure a figure is: 95% intervals of means, of paired differences and of ratios over documents.

Two kinds of doubt, two methods. Over seeds there are three values or five, so Student's t, which pays for
having to learn the spread from so few. Over documents or items there are many of very unequal size, so the
bootstrap: draw as many of them again with replacement, and see how the figure moves.

What is compared on the same seeds, documents or items is compared in pairs: what they have in common, an
easy document, a lucky order of data, takes no part in the difference.

Rejected: a normal interval over seeds (1.96 in place of 4.30 for three of them: it claims to know the
spread); a bootstrap over tokens (neighbours in a text are not independent, so it would be far too narrow).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure and the 95% interval about it, which need not lie evenly.

    Args:
        mean: the figure itself.
        low, high: ends of the interval; nan where one value tells nothing of the spread.
    """

    mean: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2

    @property
    def resolved(self) -> bool:
        """True if the interval excludes zero; False also where it is unknown."""
        return self.low > 0 or self.high < 0


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean of independent values, such as one a seed, with Student's t.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    from scipy.stats import t  # half a second to import, for a few figures at the end

    wide = t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)
    half = float(wide) * spread / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean of values[i] - others[i], where i is the same seed."""
    return mean_interval([value - other for value, other in zip(values, others, strict=True)])


def bootstrap_ratio(
    numerators: Sequence[float], denominators: Sequence[float], seed: int = 0, rounds: int = 2000
) -> Interval:
    """Sum of numerators over sum of denominators, such as bits over bytes, of clusters drawn again.

    Args:
        numerators, denominators: one each a cluster (a document, an item); denominators at least 0, not
            all 0. For a difference of two models on the same clusters give the difference of numerators.
        seed: of the draws; the same data gives the same interval.
        rounds: draws.
    """
    above, below = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if above.shape != below.shape or not below.sum() > 0:
        raise ValueError(f"expected as many denominators with a sum above 0, got {above.size}, {below.size}")
    ratio = float(above.sum() / below.sum())
    if above.size == 1:
        return Interval(ratio, math.nan, math.nan)
    random, shares = np.random.default_rng(seed), np.full(above.size, 1 / above.size)
    # One draw at a time: all together they would take rounds x clusters numbers.
    draws = (random.multinomial(above.size, shares) for _ in range(rounds))
    sums = [(draw @ above, draw @ below) for draw in draws]
    found = [top / bottom for top, bottom in sums if bottom > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(found, (tail, 1 - tail))
    return Interval(ratio, float(low), float(high))


def share_interval(values: Sequence[float]) -> Interval:
    """The share of ones among zeros and ones, with Wilson's interval, wide where all are alike too."""
    right = round(sum(values))
    from scipy.stats import binomtest

    found = binomtest(right, len(values)).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(right / len(values), float(found.low), float(found.high))
