"""What a step with FP8 moments did to its numbers, counted while they were in registers.

A step adds to `counters`, int64 [LANES, 8] on the device of its parameter, and nobody waits for it:

    column   0 zeros   1 underflows   2 saturated   3 stalled   4 nonfinite       sums
             5 smallest biased scale exponent, 255 if none                        minimum
             6 largest one, -1 if none    7 bits of the largest |m / d| as FP32   maxima

Lanes are there because thousands of programs of a GPU would queue for one address; they are joined
when the counts are read. `count_eagerly` is the plain form, from what was stored.
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.optim.moments import (
    BLOCK,
    RATIO_CODES,
    ROOT_CODES,
    ROOT_SCALE,
    SCALE_BIAS,
    Fp8Moments,
    State,
)

LANES, COLUMNS = 64, 8
NO_MIN_SCALE, NO_MAX_SCALE = 255, -1
_FP32_MAGNITUDE = 0x7FFFFFFF
_RATIO_LARGEST, _ROOT_NAN = 0x7E, 0xFF


@dataclass(frozen=True)
class StepStatistics:
    """Counts over the elements of one step, or of several added together.

    Args:
        elements: stepped, padding of the last block excluded.
        zeros: codes of sqrt(v) that are zero.
        underflows: of these, those whose exact v was above zero.
        saturated: codes of m / sqrt(v) at the largest magnitude of E4M3 (28 after its scale).
        stalled: sqrt(v) reads as before the step although its exact value changed. Stochastic rounding
            leaves most small decays in place and makes up for it in a few elements; a share near 1 over
            many steps is what shows a frozen average.
        nonfinite: elements whose v is stored as NaN.
        min_scale: smallest exponent of a block's scale, over blocks with a code that is not zero.
        max_scale: largest such exponent; both None if there is no such block.
        largest_update: largest |m^| / (sqrt(v^) + eps), in learning rates, decay excluded; NaN if one is.
    """

    elements: int = 0
    zeros: int = 0
    underflows: int = 0
    saturated: int = 0
    stalled: int = 0
    nonfinite: int = 0
    min_scale: int | None = None
    max_scale: int | None = None
    largest_update: float = 0.0

    def __add__(self, other: "StepStatistics") -> "StepStatistics":
        """Both together: counts added, extremes of the two."""
        lows = [scale for scale in (self.min_scale, other.min_scale) if scale is not None]
        highs = [scale for scale in (self.max_scale, other.max_scale) if scale is not None]
        updates = (self.largest_update, other.largest_update)
        return StepStatistics(
            elements=self.elements + other.elements,
            zeros=self.zeros + other.zeros,
            underflows=self.underflows + other.underflows,
            saturated=self.saturated + other.saturated,
            stalled=self.stalled + other.stalled,
            nonfinite=self.nonfinite + other.nonfinite,
            min_scale=min(lows, default=None),
            max_scale=max(highs, default=None),
            # max() of Python drops a NaN by position
            largest_update=next((u for u in updates if u != u), max(updates)),
        )


def blank_counters(device: torch.device) -> Tensor:
    """int64 [LANES, COLUMNS] before anything is counted."""
    row = torch.tensor([0, 0, 0, 0, 0, NO_MIN_SCALE, NO_MAX_SCALE, 0], dtype=torch.int64)
    return row.repeat(LANES, 1).to(device)


def read_counters(counters: Tensor, elements: int, mean_correction: float) -> StepStatistics:
    """Join the lanes of one step; waits for the device.

    Args:
        elements: that the step had.
        mean_correction: 1 - beta1^t of the step, which the counted quotients lack.
    """
    zeros, underflows, saturated, stalled, nonfinite = counters[:, :5].sum(dim=0).tolist()
    smallest, largest, bits = (
        int(counters[:, 5].min()),
        int(counters[:, 6].max()),
        int(counters[:, 7].max()),
    )
    return StepStatistics(
        elements=elements,
        zeros=zeros,
        underflows=underflows,
        saturated=saturated,
        stalled=stalled,
        nonfinite=nonfinite,
        min_scale=None if smallest == NO_MIN_SCALE else smallest - SCALE_BIAS,
        max_scale=None if largest == NO_MAX_SCALE else largest - SCALE_BIAS,
        largest_update=struct.unpack("f", struct.pack("I", bits))[0] / mean_correction,
    )


def count_eagerly(
    counters: Tensor, state: State, start: int, before: Tensor, exact: Tensor, quotient: Tensor
) -> None:
    """Add what a window's step did, in plain tensor operations.

    Args:
        state: of Fp8Moments, after the window was written.
        start: first element of the window, a multiple of BLOCK.
        before: [count] v as it read before the step.
        exact: [count] v before it was rounded.
        quotient: [count] m / d.
    """
    stop = start + exact.numel()
    blocks = slice(start // BLOCK, -(-stop // BLOCK))
    roots = state[ROOT_CODES][blocks].view(-1)[: exact.numel()]
    ratios = state[RATIO_CODES][blocks].view(-1)[: exact.numel()]
    is_zero = roots == 0
    stored = Fp8Moments().read(state, start, stop)[1]
    lane = counters[0]
    lane[0] += is_zero.sum()
    lane[1] += (is_zero & (exact > 0)).sum()
    lane[2] += ((ratios & 0x7F) == _RATIO_LARGEST).sum()
    lane[3] += ((stored == before) & (exact != before)).sum()
    lane[4] += (roots == _ROOT_NAN).sum()
    scales = state[ROOT_SCALE][blocks][state[ROOT_CODES][blocks].amax(dim=1, keepdim=True) > 0].to(
        torch.int64
    )
    if scales.numel():
        lane[5] = torch.minimum(lane[5], scales.min())
        lane[6] = torch.maximum(lane[6], scales.max())
    size = quotient.to(torch.float32).view(torch.int32).bitwise_and(_FP32_MAGNITUDE)
    lane[7] = torch.maximum(lane[7], size.max())
