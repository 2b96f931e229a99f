"""Power-of-two scales from the bits of amax: one law for E4M3 tiles, E4M3 blocks and E5M6 tiles.

The scale is the smallest power of two s with amax <= largest x s. With largest = m x 2^a, 1 <= m < 2, and
amax = n x 2^b that is 2^(b - a), or twice that if n > m: adding the right constant to the bits of amax
carries into the exponent exactly then.
"""

import math
from functools import cached_property
from typing import NamedTuple

import torch
from moe_comm.wire.formats import E4M3, FP32_INFINITY, FP32_MANTISSA_BITS
from moe_comm.wire.tile import FLOOR
from torch import Tensor


class Scales(NamedTuple):
    """What `ScaleLaw.of` finds: float32 factors and scales, NaN where amax is not finite."""

    inverses: Tensor
    scales: Tensor
    is_poisoned: Tensor


class ScaleLaw:
    """Scales for a format of elements.

    Args:
        largest: the format's largest value.
        floor: the least amax that a scale is made for.
        nan_code: code of all elements of a tile with anything that is not finite.
    """

    def __init__(self, largest: float, floor: float, nan_code: int) -> None:
        self.largest, self.floor, self.nan_code = largest, floor, nan_code

    @cached_property
    def _carry(self) -> int:
        mantissa = math.frexp(self.largest)[0] * 2 - 1
        return (1 << FP32_MANTISSA_BITS) - 1 - int(mantissa * (1 << FP32_MANTISSA_BITS))

    @cached_property
    def _exponent(self) -> int:
        return math.frexp(self.largest)[1] - 1

    def of(self, amax_bits: Tensor) -> Scales:
        """Scales of int32 bits of magnitudes, of any shape."""
        is_poisoned = amax_bits >= FP32_INFINITY
        floored = amax_bits.view(torch.float32).clamp(min=self.floor).view(torch.int32)
        fields = (floored + self._carry).bitwise_right_shift_(FP32_MANTISSA_BITS).sub_(self._exponent)
        inverses = (254 - fields).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
        scales = fields.bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
        inverses.masked_fill_(is_poisoned, torch.nan)
        return Scales(inverses, scales.masked_fill_(is_poisoned, torch.nan), is_poisoned)


E4M3_SCALES = ScaleLaw(E4M3.max_value, FLOOR, E4M3.nan_code)
