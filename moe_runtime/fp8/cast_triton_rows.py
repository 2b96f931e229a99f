"""Rows to tiles, and tiles and blocks back to values, on a GPU. See `cast_triton_tile.py` for the how."""

import torch
import triton
import triton.language as tl
from moe_comm.wire.tile import ScaleKind
from torch import Tensor

from moe_runtime.fp8.cast_triton_tile import (
    amax_bits,
    casts_in_hardware,
    empty_tiles,
    encode,
    magnitude_of,
    readable,
    rounded,
    scales_of,
    values_of,
)
from moe_runtime.fp8.tiled import TILE, Blocks, Tiles, num_tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
ROWS, WARPS = 32, 4  # of a program: 8 KiB of BF16, 16 bytes a thread at a time


@triton.jit
def cast_rows_kernel(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: int,
    num_columns: int,
    row_stride: int,
    scale_stride: int,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One tile of each of ROWS rows; neighbouring programs take the tiles of the same rows."""
    tiles = (num_columns + _TILE - 1) // _TILE
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    tile = tl.program_id(0) % tiles
    row = tl.arange(0, ROWS)
    column = tile * _TILE + tl.arange(0, _TILE)
    is_row = row < num_rows - first
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    source = values + first * row_stride + row[:, None] * row_stride + column[None, :]
    block = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
    bits = amax_bits(magnitude_of(block, HARDWARE_CAST), 1, HARDWARE_CAST)
    inverse, scale = scales_of(bits, POW2)
    block_codes = encode(block * inverse[:, None], HARDWARE_CAST)
    target = codes + first * num_columns + row[:, None] * num_columns + column[None, :]
    tl.store(target, block_codes, mask=is_inside)
    tl.store(scales + tile.to(tl.int64) * scale_stride + first + row, scale, mask=is_row)


@triton.jit
def decode_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    num_rows: int,
    num_columns: int,
    rows_of_matrix: int,
    code_stride: int,
    row_scale_stride: int,
    tile_scale_stride: int,
    BLOCKS: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Values of one tile of each of ROWS rows; in BLOCKS of 128 x 128 rows share their scales."""
    tiles = (num_columns + _TILE - 1) // _TILE
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    tile = tl.program_id(0) % tiles
    row = first + tl.arange(0, ROWS)
    column = tile * _TILE + tl.arange(0, _TILE)
    is_row = row < num_rows
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    block_codes = tl.load(codes + row[:, None] * code_stride + column[None, :], mask=is_inside, other=0)
    scale_row = row
    if BLOCKS:
        matrix = row // rows_of_matrix
        scale_row = (
            matrix * ((rows_of_matrix + _TILE - 1) // _TILE) + (row - matrix * rows_of_matrix) // _TILE
        )
    scale_place = scales + scale_row * row_scale_stride + tile * tile_scale_stride
    block_scales = tl.load(scale_place, mask=is_row, other=0.0)
    block = values_of(block_codes, block_scales, HARDWARE_CAST)
    place = values + row[:, None] * num_columns + column[None, :]
    tl.store(place, rounded(block, values.dtype.element_ty, HARDWARE_CAST), mask=is_inside)


def cast_rows_on_device(
    x: Tensor,
    scales: ScaleKind = "pow2",
    *,
    hardware_cast: bool | None = None,
    rows: int = ROWS,
    num_warps: int = WARPS,
) -> Tiles:
    """Rows to tiles.

    Args:
        x: [m, k] floating.
        scales: `pow2` or `fp32`.
        hardware_cast: round with the cast instruction; None: where the device has one.
        rows: of a program; a power of two.
        num_warps: of a program.

    Returns:
        Tiles [m, k].

    Ref: DSV3 §3.3.2
    """
    x = readable(x)
    made = empty_tiles(x.shape[0], x.shape[1], x.device)
    if x.numel():
        cast_rows_kernel[(triton.cdiv(x.shape[0], rows) * num_tiles(x.shape[1]),)](
            x,
            made.codes,
            made.scales,
            x.shape[0],
            x.shape[1],
            x.stride(0),
            made.scales.stride(1),
            POW2=scales == "pow2",
            HARDWARE_CAST=casts_in_hardware(x.device, hardware_cast),
            ROWS=rows,
            num_warps=num_warps,
        )
    return made


def decode_on_device(
    matrix: Tiles | Blocks, dtype: torch.dtype = torch.float32, *, hardware_cast: bool | None = None
) -> Tensor:
    """Values of tiles or blocks.

    Args:
        matrix: of shape [.., rows, columns].
        dtype: float32, bfloat16, float16 or float64; code x scale in FP32, rounded once.
        hardware_cast: use the conversion instructions; None: where the device has them.

    Returns:
        [.., rows, columns] of dtype.
    """
    is_blocks = isinstance(matrix, Blocks)
    wide = torch.float32 if dtype == torch.float64 else dtype
    values = torch.empty(matrix.shape, dtype=wide, device=matrix.codes.device)
    if not values.numel():
        return values.to(dtype)
    columns = matrix.shape[-1]
    codes = matrix.codes.reshape(-1, columns)
    codes = codes if columns < 2 or codes.stride(1) == 1 else codes.contiguous()
    scales = matrix.scales.reshape(-1, num_tiles(columns))
    decode_kernel[(triton.cdiv(codes.shape[0], ROWS) * num_tiles(columns),)](
        codes,
        scales,
        values,
        codes.shape[0],
        columns,
        matrix.shape[-2],
        codes.stride(0),
        scales.stride(0),
        scales.stride(1),
        BLOCKS=is_blocks,
        HARDWARE_CAST=casts_in_hardware(codes.device, hardware_cast),
        ROWS=ROWS,
        num_warps=WARPS,
    )
    return values.to(dtype)
