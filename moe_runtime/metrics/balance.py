"""Counts of tokens per expert -> how uneven the load is."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ExpertBalance:
    """How evenly the experts of one layer were used; loads are relative to the mean load.

    Args:
        load_max, load_min: of the busiest and the idlest expert; 1 is a fair share.
        violation: (max load - mean) / mean.
    """

    load_max: float
    load_min: float
    violation: float


def expert_balance(counts: Tensor) -> tuple[ExpertBalance, ...]:
    """Balance of each layer.

    Args:
        counts: int64 [layers, experts], token copies that each expert received.

    Returns:
        One entry a layer. A layer that received nothing is even: 1, 1 and 0.
    """
    rows = []
    for load in counts.tolist():
        mean = sum(load) / len(load)
        busiest, idlest = (max(load) / mean, min(load) / mean) if mean > 0 else (1.0, 1.0)
        rows.append(ExpertBalance(busiest, idlest, busiest - 1.0))
    return tuple(rows)
