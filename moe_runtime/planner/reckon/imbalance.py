"""From how unequal experts are to how unequal ranks are, which is what a step waits for.

Runs record the violation, (max load - mean) / mean over the experts of a layer. A rank holds several experts,
so a popular one is averaged with its neighbours. If loads of experts scatter independently about their mean,
the fullest of n experts is z(n) deviations above it, and of n / k ranks with k experts each

    fullest rank / mean = 1 + violation x z(n / k) / (z(n) sqrt(k))

with z(n) the mean of the largest of n normal deviates. Where popular experts are neighbours, ranks differ by
more, up to the violation itself.

The load that a step waits for is that of one microbatch over the ranks of one expert-parallel group; the
violation of a whole batch is smaller, for what is popular changes from text to text.
"""

import math

from moe_runtime.config.schema import ModelConfig

_STEPS = 2_000


def rank_imbalance(model: ModelConfig, ep: int, violation: float) -> float:
    """Rows of the fullest rank over the mean, of a violation of experts.

    Args:
        violation: (max - mean) / mean over the routed experts of a layer.
    """
    held = model.num_experts // ep
    if ep == 1:
        return 1.0
    return 1 + violation * largest_deviate(ep) / (largest_deviate(model.num_experts) * math.sqrt(held))


def largest_deviate(count: int) -> float:
    """Mean of the largest of `count` normal deviates, by the trapezoid rule over -8 to 8."""
    total, width = 0.0, 16.0 / _STEPS
    for step in range(_STEPS + 1):
        x = -8.0 + step * width
        density = math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        below = 0.5 * math.erfc(-x / math.sqrt(2))
        total += x * count * density * below ** (count - 1) * width
    return total
