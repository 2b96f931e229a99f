"""The slow oracle of the tile quantiser: what `tile.py` means, one tile at a time in plain Python.

Python computes in FP64 and `_fp32` rounds the result; for one product or quotient of FP32 numbers that
equals the FP32 operation (53 bits are more than twice 24 and two). Elements are rounded by `formats.py`
in integers. No vector arithmetic, no cast of torch.
"""

import math
import struct

import torch
from torch import Tensor

from moe_comm.wire.formats import E4M3, encode_nearest
from moe_comm.wire.tile import FLOOR, NAN_SCALE_BYTE, TILE, ScaleKind, num_tiles


def reference_quantise(values: Tensor, scales: ScaleKind = "fp32") -> tuple[Tensor, Tensor]:
    """See `quantise_tiles`.

    Ref: DSV3 §3.3.2
    """
    rows, columns = values.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8)
    made = torch.empty((rows, num_tiles(columns)), dtype=torch.float32 if scales == "fp32" else torch.uint8)
    for row in range(rows):
        for tile in range(num_tiles(columns)):
            place = slice(tile * TILE, min((tile + 1) * TILE, columns))
            numbers = [_fp32(number) for number in values[row, place].double().tolist()]
            codes[row, place], made[row, tile] = _quantise_tile(numbers, scales)
    return codes, made


def reference_dequantise(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `dequantise_tiles`."""
    rows, columns = codes.shape
    values = torch.empty((rows, columns), dtype=torch.float32)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row, column // TILE].item()
            if scales.dtype == torch.uint8:
                scale = math.nan if scale == NAN_SCALE_BYTE else 2.0 ** (scale - 127)
            values[row, column] = _fp32(_e4m3(int(codes[row, column])) * scale)
    return values.to(dtype)


def _quantise_tile(numbers: list[float], scales: ScaleKind) -> tuple[Tensor, float]:
    """(codes uint8 [len(numbers)], the scale as it travels)."""
    if not all(math.isfinite(number) for number in numbers):
        codes = torch.full((len(numbers),), E4M3.nan_code, dtype=torch.uint8)
        return codes, math.nan if scales == "fp32" else NAN_SCALE_BYTE
    amax = max(FLOOR, *(abs(number) for number in numbers))
    if scales == "fp32":
        inverse, travels = _fp32(E4M3.max_value / amax), _fp32(amax * _fp32(1 / E4M3.max_value))
    else:
        exponent = -126
        while 2.0**exponent * E4M3.max_value < amax:
            exponent += 1
        inverse, travels = 2.0**-exponent, exponent + 127
    scaled = torch.tensor([_fp32(number * inverse) for number in numbers], dtype=torch.float32)
    return encode_nearest(scaled, E4M3), travels


def _e4m3(code: int) -> float:
    """Value of a code; that of NaN reads as the 480 it would be, since NaN is said by the scale."""
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10)
    return -magnitude if code & 0x80 else magnitude


def _fp32(number: float) -> float:
    """The nearest FP32 number, ties to even; beyond the largest, infinity."""
    if not math.isfinite(number):
        return number
    try:
        return float(struct.unpack("f", struct.pack("f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)
