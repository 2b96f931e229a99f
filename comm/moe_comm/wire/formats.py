"""Three eight-bit floating-point formats and their exact rounding, in integers on FP32 bits.

    E4M3    sign 4 3   finite to 448      smallest 2^-9    no infinity; 0x7F and 0xFF are NaN
    E5M2    sign 5 2   finite to 57344    smallest 2^-16   infinity and NaN as IEEE 754 has them
    UE5M3        5 3   finite to 114688   smallest 2^-17   no sign, no infinity; 0xFF is NaN

UE5M3 is ours: it holds what is never negative (square roots of second moments) and spends the sign
bit on precision, so that it has the range of E5M2 with the three mantissa bits of E4M3.

Why integers: hardware casts, their emulations and Triton's interpreter disagree on ties, saturation
and infinities. Adding to the bits of a non-negative FP32 number and cutting them off is the same
everywhere. A number at or above the format's smallest normal is rounded on its own bits (rebias the
exponent, add, shift); one below it is an integer number of quanta, so it becomes fixed point with
FRACTION_BITS fraction bits (scaling by a power of two and cutting to an integer are exact) and is
rounded there. Where the other way is meant, each of the two gives the smaller code, so their
maximum is the answer and no select is needed (selects are the slowest operation on a CPU).

    nearest       ties to the even code
    stochastic    up with the probability of the fraction that would be cut off: no bias; a value that
                  the format holds never moves, zero stays zero

Values. Finite numbers too large saturate. Infinity stays infinity in E5M2 and becomes NaN in the
other two; NaN stays NaN: something non-finite never comes back as a number. In UE5M3 finite negative
numbers and minus infinity saturate at zero. Minus zero keeps its sign where there is one.

This file is arithmetic of single numbers; scales of tiles and blocks are elsewhere.
"""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from moe_comm.errors import NumericsError

FP32_BIAS, FP32_MANTISSA_BITS = 127, 23
FP32_MAGNITUDE, FP32_INFINITY = 0x7FFFFFFF, 0x7F800000
# Fixed point below the smallest normal: 3 bits of quanta + 27 of fraction stay below 2^31 with room
# for a carry. For nearest rounding 25 would be exact; for stochastic rounding the fraction's
# resolution is the error of the probability, at most 2^-27.
FRACTION_BITS = 27


@dataclass(frozen=True)
class Float8Format:
    """A format of eight bits: [sign] exponent mantissa, bias 2^(exponent_bits - 1) - 1.

    Args:
        max_code: code of the largest finite value, sign bit zero.
        has_infinity: the code after `max_code` is infinity; else it is NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    is_signed: bool
    max_code: int
    has_infinity: bool

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def max_value(self) -> float:
        return _value_of(self, self.max_code)

    @property
    def max_exponent(self) -> int:
        """floor(log2(max_value))."""
        return (self.max_code >> self.mantissa_bits) - self.bias

    @property
    def smallest_exponent(self) -> int:
        """log2 of the smallest positive value, the quantum of the subnormals."""
        return 1 - self.bias - self.mantissa_bits

    @property
    def nan_code(self) -> int:
        return 0x7F if self.is_signed else 0xFF


E4M3 = Float8Format("e4m3", 4, 3, True, 0x7E, False)
E5M2 = Float8Format("e5m2", 5, 2, True, 0x7B, True)
UE5M3 = Float8Format("ue5m3", 5, 3, False, 0xFE, False)


def encode_nearest(values: Tensor, fmt: Float8Format) -> Tensor:
    """Round to the nearest value of `fmt`, ties to the even code.

    Args:
        values: float32, any shape.

    Returns:
        uint8 codes of the same shape.

    Raises:
        NumericsError: `values` is not float32 (a wider type would be rounded twice).
    """
    magnitude, normal, fixed = _split(values, fmt)
    drop = FP32_MANTISSA_BITS - fmt.mantissa_bits
    return _join(values, fmt, magnitude, _nearest_shift(normal, drop), _nearest_shift(fixed, FRACTION_BITS))


def encode_stochastic(values: Tensor, fmt: Float8Format, noise: Tensor) -> Tensor:
    """Round up or down at random so that the mean is `values`.

    Args:
        values: float32, any shape.
        noise: int32 of the same shape, uniform in all bits; the lower FRACTION_BITS are used.

    Returns:
        uint8 codes of the same shape.

    Raises:
        NumericsError: `values` is not float32.
    """
    magnitude, normal, fixed = _split(values, fmt)
    drop = FP32_MANTISSA_BITS - fmt.mantissa_bits
    threshold = noise & ((1 << FRACTION_BITS) - 1)
    fixed = fixed.add_(threshold).bitwise_right_shift_(FRACTION_BITS)
    # The leading bits of the same threshold: then `normal` exceeds `fixed` only where it is meant.
    normal = normal.add_(threshold.bitwise_right_shift_(FRACTION_BITS - drop)).bitwise_right_shift_(drop)
    return _join(values, fmt, magnitude, normal, fixed)


def decode(codes: Tensor, fmt: Float8Format) -> Tensor:
    """Values of uint8 `codes` as float32 of the same shape, exact."""
    table = decode_table(fmt, codes.device)
    return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)


@cache
def decode_table(fmt: Float8Format, device: torch.device) -> Tensor:
    """The 256 values of `fmt`, float32 [256] on `device`; shared, not to be written to."""
    return torch.tensor([_value_of(fmt, code) for code in range(256)], dtype=torch.float32, device=device)


def _value_of(fmt: Float8Format, code: int) -> float:
    sign = -1.0 if fmt.is_signed and code & 0x80 else 1.0
    code = code & 0x7F if fmt.is_signed else code
    if code > fmt.max_code:
        return sign * float("inf") if fmt.has_infinity and code == fmt.max_code + 1 else float("nan")
    exponent, mantissa = code >> fmt.mantissa_bits, code & ((1 << fmt.mantissa_bits) - 1)
    significand = mantissa if exponent == 0 else mantissa + (1 << fmt.mantissa_bits)
    return float(sign * significand * 2.0 ** (max(exponent, 1) - 1 + fmt.smallest_exponent))


def _split(values: Tensor, fmt: Float8Format) -> tuple[Tensor, Tensor, Tensor]:
    """(|values| as bits, bits with the format's exponent bias, quanta in fixed point), fresh int32."""
    if values.dtype != torch.float32:
        raise NumericsError(f"encoding to {fmt.name}: expected float32, got {values.dtype}; convert it first")
    unsigned = values if fmt.is_signed else values.clamp(min=0.0)
    magnitude = unsigned.view(torch.int32) & FP32_MAGNITUDE
    normal = magnitude - ((FP32_BIAS - fmt.bias) << FP32_MANTISSA_BITS)
    smallest_normal_bits = (FP32_BIAS + 1 - fmt.bias) << FP32_MANTISSA_BITS
    small = magnitude.clamp(max=smallest_normal_bits).view(torch.float32)
    fixed = small.mul_(2.0 ** (FRACTION_BITS - fmt.smallest_exponent)).to(torch.int32)
    return magnitude, normal, fixed


def _nearest_shift(bits: Tensor, drop: int) -> Tensor:
    """bits / 2^drop to nearest, ties to even, in place; `bits` below -2^drop may give any negative."""
    is_odd = (bits >> drop).bitwise_and_(1)
    return bits.add_((1 << (drop - 1)) - 1).add_(is_odd).bitwise_right_shift_(drop)


def _join(values: Tensor, fmt: Float8Format, magnitude: Tensor, normal: Tensor, fixed: Tensor) -> Tensor:
    """Pick the code, saturate, mark what is not finite, add the sign; writes over its arguments."""
    codes = torch.maximum(normal, fixed, out=normal).clamp_(max=fmt.max_code)
    if fmt.has_infinity:
        codes.masked_fill_(magnitude == FP32_INFINITY, fmt.max_code + 1)
        codes.masked_fill_(magnitude > FP32_INFINITY, fmt.nan_code)
    else:
        # Adding 2^23 to the bits of infinity or NaN overflows into the sign: -1 there, else 0. The code
        # of NaN is the one after `max_code`. (A comparison and a select cost three times as much.)
        codes.sub_(magnitude.add_(1 << FP32_MANTISSA_BITS).bitwise_right_shift_(31))
    if fmt.is_signed:
        sign = torch.bitwise_right_shift(values.view(torch.int32), 24, out=fixed).bitwise_and_(0x80)
        codes.bitwise_or_(sign)
    return codes.to(torch.uint8)
