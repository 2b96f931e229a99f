"""A test of counts against probabilities."""

import math

import torch
from torch import Tensor


def g_test_p_value(counts: Tensor, probs: Tensor) -> float:
    """Chance of counts at least this far from `probs`, if they were drawn from it.

    Cells of probability 0 must be empty; those that expect less than 5 are taken together.

    Args:
        counts: int64 [cells].
        probs: float64 [cells], sums to 1.
    """
    if int(counts[probs == 0].sum()) > 0:
        return 0.0
    total = int(counts.sum())
    expected = probs.double() * total
    is_rare = expected < 5
    seen = torch.cat([counts[~is_rare].double(), counts[is_rare].sum().view(1).double()])
    wanted = torch.cat([expected[~is_rare], expected[is_rare].sum().view(1)])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    if len(wanted) < 2:
        return 1.0
    statistic = 2 * torch.xlogy(seen, seen / wanted).sum()
    half = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    p_value = torch.special.gammaincc(half, (statistic / 2).clamp(min=0.0))
    assert math.isfinite(p_value)
    return float(p_value)
