"""Weights to 128 x 128 blocks on a GPU, and their transposed codes from the same read.

Fprop wants the weight, Dgrad the transposed one; the blocks' scales are the same, so the second costs one
byte an element to write and nothing to read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.cast_triton_columns import read_quarter
from moe_runtime.fp8.cast_triton_tile import (
    amax_bits,
    casts_in_hardware,
    encode,
    encode_joined,
    larger_of,
    magnitude_of,
    readable,
    scales_of,
)
from moe_runtime.fp8.tiled import TILE, Blocks, num_tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
WARPS = 4


@triton.jit
def cast_weight_kernel(
    weight: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    transposed: tl.tensor,
    num_rows: int,
    num_columns: int,
    matrix_stride: int,
    row_stride: int,
    row_words: int,
    BOTH: tl.constexpr,
    WORDS: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """One block. WORDS: `transposed` is int32, four codes each (the number of rows is a multiple of 4)."""
    tiles = (num_columns + _TILE - 1) // _TILE
    bands = (num_rows + _TILE - 1) // _TILE
    tile = tl.program_id(0) % tiles
    band = tl.program_id(0) // tiles % bands
    matrix = (tl.program_id(0) // tiles // bands).to(tl.int64)
    first = band * _TILE
    count = num_rows - first
    column = tile * _TILE + tl.arange(0, _TILE)
    is_column = column < num_columns
    source = weight + matrix * matrix_stride + first.to(tl.int64) * row_stride
    row = 4 * tl.arange(0, 32)
    v0 = read_quarter(source, row, count, row_stride, column, num_columns)
    v1 = read_quarter(source, row + 1, count, row_stride, column, num_columns)
    v2 = read_quarter(source, row + 2, count, row_stride, column, num_columns)
    v3 = read_quarter(source, row + 3, count, row_stride, column, num_columns)
    low = larger_of(magnitude_of(v0, HARDWARE_CAST), magnitude_of(v1, HARDWARE_CAST), HARDWARE_CAST)
    high = larger_of(magnitude_of(v2, HARDWARE_CAST), magnitude_of(v3, HARDWARE_CAST), HARDWARE_CAST)
    columns_high = amax_bits(larger_of(low, high, HARDWARE_CAST), 0, HARDWARE_CAST)
    inverse, scale = scales_of(tl.max(columns_high, axis=0), True)
    tl.store(scales + (matrix * bands + band) * tiles + tile, scale)
    c0, c1 = encode(v0 * inverse, HARDWARE_CAST), encode(v1 * inverse, HARDWARE_CAST)
    c2, c3 = encode(v2 * inverse, HARDWARE_CAST), encode(v3 * inverse, HARDWARE_CAST)
    start = matrix * num_rows * num_columns
    target = codes + start + first.to(tl.int64) * num_columns
    for step in tl.static_range(4):
        part = c0 if step == 0 else (c1 if step == 1 else (c2 if step == 2 else c3))
        at = row + step
        place = target + at[:, None] * num_columns + column[None, :]
        tl.store(place, part, mask=(at < count)[:, None] & is_column[None, :])
        if BOTH and not WORDS:
            mirrored = transposed + start + column.to(tl.int64)[:, None] * num_rows + (first + at)[None, :]
            tl.store(mirrored, tl.trans(part), mask=is_column[:, None] & (at < count)[None, :])
    if BOTH and WORDS:
        words = encode_joined(v0 * inverse, v1 * inverse, v2 * inverse, v3 * inverse, HARDWARE_CAST)
        word = band * 32 + tl.arange(0, 32)
        mirror = transposed + matrix * row_words * num_columns
        place = mirror + column.to(tl.int64)[:, None] * row_words + word[None, :]
        tl.store(place, tl.trans(words), mask=is_column[:, None] & (word < row_words)[None, :])


def _cast(weight: Tensor, both: bool, hardware_cast: bool | None, num_warps: int) -> tuple[Blocks, Tensor]:
    """The blocks and, if wanted, the transposed codes."""
    *experts, rows, columns = weight.shape
    matrices = readable(weight).reshape(-1, rows, columns)
    device = weight.device
    codes = torch.empty((*experts, rows, columns), dtype=torch.uint8, device=device)
    scales = torch.empty((*experts, num_tiles(rows), num_tiles(columns)), device=device)
    transposed = torch.empty((*experts, columns, rows) if both else 0, dtype=torch.uint8, device=device)
    if codes.numel():
        words = both and rows % 4 == 0
        cast_weight_kernel[(scales.numel(),)](
            matrices,
            codes,
            scales,
            transposed.view(torch.int32) if words else transposed,
            rows,
            columns,
            matrices.stride(0),
            matrices.stride(1),
            rows // 4,
            BOTH=both,
            WORDS=words,
            HARDWARE_CAST=casts_in_hardware(device, hardware_cast),
            num_warps=num_warps,
        )
    return Blocks(codes, scales), transposed


def cast_weight_on_device(
    weight: Tensor, *, hardware_cast: bool | None = None, num_warps: int = WARPS
) -> Blocks:
    """A weight, or one of each expert, in blocks.

    Args:
        weight: [.., n, k] floating.
        hardware_cast: round with the cast instruction; None: where the device has one.
        num_warps: of a program, which takes one block.

    Returns:
        Blocks [.., n, k].

    Ref: DSV3 §3.3.2
    """
    return _cast(weight, False, hardware_cast, num_warps)[0]


def cast_weight_both_on_device(
    weight: Tensor, *, hardware_cast: bool | None = None, num_warps: int = WARPS
) -> tuple[Blocks, Blocks]:
    """`cast_weight_on_device` and the transposed of it, [.., k, n], from one read."""
    blocks, transposed = _cast(weight, True, hardware_cast, num_warps)
    return blocks, Blocks(transposed, blocks.scales.transpose(-2, -1).contiguous())
