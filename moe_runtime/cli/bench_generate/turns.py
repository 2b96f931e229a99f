"""Times contenders in turn: each round runs all of them, in an order that rotates.

What else the machine does then hits all alike, and the figure that counts is the median over rounds of the
ratio within a round, not the ratio of medians from different times.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

# Does the work of a round and says how many tokens it made.
Contender = Callable[[int], int]


def in_turn(
    contenders: Mapping[str, Contender],
    baseline: str,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, Any]]:
    """Time contenders over rounds, after one of each that does not count.

    Args:
        contenders: by name.
        baseline: the one that the others are divided by.
        rounds: at least 1.
        clock: seconds.

    Returns:
        by name: tokens_per_s (median), tokens_per_s_range, ratio (median over rounds of its tokens/s over the
        baseline's), ratio_range.
    """
    names = list(contenders)
    for name in names:
        contenders[name](0)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = clock()
            tokens = contenders[name](turn)
            speeds[name].append(tokens / (clock() - began))
    return {name: _summary(speeds[name], speeds[baseline]) for name in names}


def _summary(speeds: list[float], baseline: list[float]) -> dict[str, Any]:
    ratios = [one / other for one, other in zip(speeds, baseline, strict=True)]
    return {
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_range": [min(speeds), max(speeds)],
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }
