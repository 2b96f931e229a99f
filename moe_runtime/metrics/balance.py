"""Counts of tokens per expert -> how uneven the load is, layer by layer.

A load is relative to the mean load of its layer, so 1 is a fair share. A layer that received nothing is even.
"""

import math

import torch
from torch import Tensor

DEAD = 0.01  # share of a fair share below which an expert is as good as dead


def relative_load(counts: Tensor) -> Tensor:
    """Load of each expert over the mean of its layer.

    Args:
        counts: int64 [layers, experts], token copies that each expert received.

    Returns:
        FP64 [layers, experts].
    """
    mean = counts.double().mean(dim=1, keepdim=True)
    return torch.where(mean > 0, counts / mean.clamp_min(1e-300), 1.0)


def violation(load: Tensor) -> Tensor:
    """(max load - mean) / mean of relative loads [layers, experts]: [layers]. Ref: arXiv 2408.15664 (4)."""
    return load.amax(dim=1) - 1.0


def load_entropy(load: Tensor) -> Tensor:
    """H(p) / ln E of relative loads [layers, E]: [layers], 1 if even, 0 if one expert has everything."""
    experts = load.shape[1]
    if experts == 1:
        return load.new_ones(load.shape[0])
    shares = load / experts
    return -torch.special.xlogy(shares, shares).sum(dim=1) / math.log(experts)


def dead_experts(load: Tensor) -> Tensor:
    """How many of the experts have less than `DEAD` of a fair share: [layers]."""
    return (load < DEAD).sum(dim=1)


def rank_load_ratio(load: Tensor, ep: int) -> Tensor:
    """Load of the busiest of `ep` ranks over the mean of them: [layers].

    Ranks hold experts in equal contiguous parts. The busiest one is what a layer's computation waits for,
    whatever the experts within a rank do.
    """
    return load.unflatten(1, (ep, -1)).mean(dim=2).amax(dim=1)


def is_starved(load: Tensor, bias: Tensor, is_moving: bool) -> Tensor:
    """Dead experts that the routing bias does not bring back: bool [layers, experts].

    A bias above its layer's mean draws tokens to its expert, and that of an expert without any rises step by
    step: such an expert is on its way. One whose bias has yet to climb so far is not.

    Args:
        load: relative [layers, experts].
        bias: of the routers [layers, experts].
        is_moving: biases follow the load; else none of them helps.
    """
    return (load < DEAD) & ~(_is_above_mean(bias) & is_moving)


def unchecked_violation(load: Tensor, bias: Tensor, is_moving: bool) -> Tensor:
    """Violation where the bias of the busiest expert does not hold it back, 0 where it does: [layers].

    Args:
        load: relative, of many steps together [layers, experts].
        bias, is_moving: as above.
    """
    busiest = load.argmax(dim=1, keepdim=True)
    is_held = _is_above_mean(-bias).gather(1, busiest).squeeze(1) & is_moving
    return violation(load).masked_fill(is_held, 0.0)


def _is_above_mean(bias: Tensor) -> Tensor:
    return bias > bias.mean(dim=1, keepdim=True)
