"""The slow oracle of the casts: what they mean, one tile at a time in Python's exact fractions.

Only scales that are powers of two are here (those of `fp32` have `moe_comm.wire.tile_reference`): with them
a cast is exact but for one rounding, so a fraction, a floor of a logarithm and Python's `round` (ties to
even) say all of it. No vector arithmetic, no cast of torch, no bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles, num_tiles


@dataclass(frozen=True)
class Law:
    """A format of elements, and what a tile of them does.

    Args:
        exponent_bits, mantissa_bits: bias 2^(exponent_bits - 1) - 1.
        largest: the largest finite value.
        floor: the least amax that a scale is made for.
        nan_code: code of every element of a tile with anything not finite.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: Fraction
    floor: Fraction
    nan_code: int

    @property
    def bias(self) -> int:
        return (1 << self.exponent_bits - 1) - 1


E4M3_LAW = Law(4, 3, Fraction(448), Fraction(2) ** -100, 0x7F)
E5M6_LAW = Law(5, 6, Fraction(65024), Fraction(2) ** -90, 0x7FF)


def reference_tile(numbers: list[float], law: Law) -> tuple[list[int], float]:
    """(codes, scale) of the numbers of one tile or block."""
    if not all(math.isfinite(number) for number in numbers):
        return [law.nan_code] * len(numbers), math.nan
    amax = max([law.floor, *(abs(Fraction(number)) for number in numbers)])
    exponent = _floor_log2(amax / law.largest)
    exponent += Fraction(2) ** exponent * law.largest < amax
    scale = Fraction(2) ** exponent
    return [_code(number, scale, law) for number in numbers], float(scale)


def reference_value(code: int, scale: float, law: Law) -> float:
    """Value of a code, rounded to FP32, where only overflow can round."""
    if math.isnan(scale):
        return math.nan
    sign_bit = 1 << law.exponent_bits + law.mantissa_bits
    field, mantissa = divmod(code & sign_bit - 1, 1 << law.mantissa_bits)
    significand = mantissa if field == 0 else mantissa + (1 << law.mantissa_bits)
    magnitude = float(significand * Fraction(2) ** (max(field, 1) - law.bias - law.mantissa_bits)) * scale
    magnitude = math.inf if magnitude >= 2.0**128 else magnitude
    return -magnitude if code & sign_bit else magnitude


def reference_rows(x: Tensor) -> Tiles:
    """See `cast.cast_rows`, scales powers of two."""
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, num_tiles(columns))
    for row in range(rows):
        for tile in range(num_tiles(columns)):
            span = slice(tile * TILE, (tile + 1) * TILE)
            made, scales[row, tile] = reference_tile(x[row, span].float().tolist(), E4M3_LAW)
            codes[row, span] = torch.tensor(made, dtype=torch.uint8)
    return Tiles(codes, scales)


def reference_columns(x: Tensor, groups: Groups) -> Tiles:
    """See `cast.cast_columns`: the transposed matrix, gaps full of zeros, cast by rows; gaps have code 0."""
    padded = torch.zeros(x.shape[1], groups.num_padded)
    is_gap = torch.ones(groups.num_padded, dtype=torch.bool)
    for row, place in enumerate(_places(groups)):
        padded[:, place] = x[row].float()
        is_gap[place] = False
    tiles = reference_rows(padded)
    tiles.codes[:, is_gap] = 0
    return tiles


def reference_columns_of(tiles: Tiles, groups: Groups) -> Tiles:
    """See `cast.columns_of`: codes to values, values to codes under the new scales."""
    return reference_columns(reference_decode(tiles), groups)


def reference_decode(tiles: Tiles) -> Tensor:
    """See `cast.decode`: float32 values [rows, columns]."""
    rows, columns = tiles.shape
    values = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            code, scale = int(tiles.codes[row, column]), float(tiles.scales[row, column // TILE])
            values[row, column] = reference_value(code, scale, E4M3_LAW)
    return values


def reference_blocks(weight: Tensor) -> Blocks:
    """See `cast.cast_weight`, for one matrix [n, k]."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(num_tiles(rows), num_tiles(columns))
    for row in range(num_tiles(rows)):
        for column in range(num_tiles(columns)):
            place = slice(row * TILE, (row + 1) * TILE), slice(column * TILE, (column + 1) * TILE)
            block = weight[place].float()
            made, scales[row, column] = reference_tile(block.flatten().tolist(), E4M3_LAW)
            codes[place] = torch.tensor(made, dtype=torch.uint8).view(block.shape)
    return Blocks(codes, scales)


def _places(groups: Groups) -> Iterator[int]:
    """Where each row stands among the padded tokens."""
    start = 0
    for count in groups.counts.tolist():
        yield from range(start, start + count)
        start += -(-count // TILE) * TILE


def _code(number: float, scale: Fraction, law: Law) -> int:
    """The nearest code, ties to the even one."""
    sign = 1 << law.exponent_bits + law.mantissa_bits if math.copysign(1, number) < 0 else 0
    magnitude = abs(Fraction(number)) / scale
    if magnitude == 0:
        return sign
    exponent = max(_floor_log2(magnitude), 1 - law.bias)
    quanta = round(magnitude / Fraction(2) ** (exponent - law.mantissa_bits))
    # A normal number's leading quantum is the step in the exponent field that the shift left out.
    return sign | (exponent + law.bias - 1 << law.mantissa_bits) + quanta


def _floor_log2(positive: Fraction) -> int:
    exponent = positive.numerator.bit_length() - positive.denominator.bit_length()
    return exponent - (Fraction(2) ** exponent > positive)
