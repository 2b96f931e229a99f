"""What Hopper's tensor cores do to a long FP8 sum, emulated: why sums are promoted every 128 products.

One instruction adds 32 products to an accumulator. It shifts all 33 addends to the largest exponent among
them, keeps 14 bits of each, cuts off the rest, and keeps 14 bits of the sum. While the accumulator is small
that loses little; once it has grown, each product loses what lies below its last bit, always towards zero, so
that errors of sums of one sign add up. Promotion copies the accumulator to FP32 every 128 products, before it
grows. Ref: DSV3 §3.3.2, Figure 7.

Measured with this emulation at K = 4096 on E4M3 operands, 32 x 32 results (tests/unit/fp8):

    operands            error          without promotion    every 128
    uniform in [0, 1)   largest |e/y|        6.9 %            0.06 %
    normal              |e| / |y|            0.13 %           0.013 %

The report gives "nearly 2 %" for random matrices and does not say of which law; ours lie around it. What the
hardware does beyond this description (the order within an instruction, guard bits) is not published.
"""

import torch
from moe_comm.wire.formats import FP32_MANTISSA_BITS
from torch import Tensor

PRODUCTS_AT_ONCE = 32
BITS = 14
_TINY = 2.0**-100  # stands in for zero where an exponent is wanted


def narrow_product(left: Tensor, right: Tensor, promote_every: int | None, bits: int = BITS) -> Tensor:
    """float32 [m, n]: sum_k left[m, k] right[n, k] with an accumulator of few bits.

    Args:
        left: float32 [m, k] of values that FP8 holds; right: [n, k], so that their products are exact.
        promote_every: products after which the accumulator is added to an FP32 sum, a multiple of 32; None:
            never.
        bits: kept of each addend and of the accumulator, the leading one included.
    """
    total = torch.zeros(left.shape[0], right.shape[0])
    narrow = torch.zeros_like(total)
    for first in range(0, left.shape[1], PRODUCTS_AT_ONCE):
        span = slice(first, first + PRODUCTS_AT_ONCE)
        products = left[:, None, span] * right[None, :, span]
        addends = torch.cat([products, narrow.unsqueeze(-1)], dim=-1)
        narrow = _cut(addends, addends.abs().amax(-1, keepdim=True), bits).double().sum(-1).float()
        narrow = _cut(narrow, narrow.abs(), bits)
        if promote_every and (first + PRODUCTS_AT_ONCE) % promote_every == 0:
            total += narrow
            narrow = torch.zeros_like(total)
    return total + narrow


def _cut(values: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Values without what lies below the last of `bits` bits of `largest`, towards zero."""
    exponents = torch.frexp(largest.clamp(min=_TINY)).exponent - bits
    quantum = (exponents + 127).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)
    return torch.trunc(values / quantum) * quantum
