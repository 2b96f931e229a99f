"""Casts on a GPU that transpose: columns of a matrix in tiles along its tokens.

A program takes one tile of 128 tokens and some columns; `Groups.tile_rows` says which rows those tokens
are, so groups need no pass of their own and every gap is filled with zeros by the program that meets it.
How the codes are transposed is told in `cast_triton_tile.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.cast_triton_tile import (
    amax_bits,
    casts_in_hardware,
    empty_tiles,
    encode,
    encode_joined,
    larger_of,
    launch_options,
    magnitude_of,
    readable,
    scales_of,
    values_of,
    word_mask,
)
from moe_runtime.fp8.tiled import TILE, Groups, Tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
COLUMNS, COLUMN_WARPS = 64, 2  # of a program of `cast_columns`: 16 KiB of BF16
BOTH_WARPS = (
    4  # twice that without the cast instruction; `cast_both` needs 128 columns, for it makes row tiles too
)


@triton.jit
def store_columns(
    quarters: tl.tuple,
    target: tl.tuple,
    tile: tl.tensor,
    count: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """Cast 128 tokens along the tokens and write them transposed.

    Args:
        quarters: four of float32 [32, columns]; rows from `count` on are a gap.
        target: (int32 words [num_columns, row_words], float32 scales at [tile, column], row_words, distance
            of the tiles' scales).
    """
    v0, v1, v2, v3 = quarters
    words, scales, row_words, scale_stride = target
    low = larger_of(magnitude_of(v0, HARDWARE_CAST), magnitude_of(v1, HARDWARE_CAST), HARDWARE_CAST)
    high = larger_of(magnitude_of(v2, HARDWARE_CAST), magnitude_of(v3, HARDWARE_CAST), HARDWARE_CAST)
    bits = amax_bits(larger_of(low, high, HARDWARE_CAST), 0, HARDWARE_CAST)
    inverse, scale = scales_of(bits, POW2)
    factor = inverse[None, :]
    packed = encode_joined(v0 * factor, v1 * factor, v2 * factor, v3 * factor, HARDWARE_CAST)
    packed &= word_mask(count)[:, None]
    is_column = column < num_columns
    place = words + column.to(tl.int64)[:, None] * row_words + (tile * 32 + tl.arange(0, 32))[None, :]
    tl.store(place, tl.trans(packed), mask=is_column[:, None])
    tl.store(scales + tile.to(tl.int64) * scale_stride + column, scale, mask=is_column)


@triton.jit
def store_row_tile(
    values: tl.tensor,
    target: tl.tuple,
    row: tl.tensor,
    is_row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """Cast rows [32, 128], one tile each, and write them at `row` and `column` of [.., num_columns].

    Args:
        target: (codes of row 0, scale of this tile in row 0).
    """
    codes, scales = target
    inverse, scale = scales_of(amax_bits(magnitude_of(values, HARDWARE_CAST), 1, HARDWARE_CAST), POW2)
    place = codes + row[:, None] * num_columns + column[None, :]
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    tl.store(place, encode(values * inverse[:, None], HARDWARE_CAST), mask=is_inside)
    tl.store(scales + row, scale, mask=is_row)


@triton.jit
def read_quarter(
    values: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    stride: tl.tensor,
    column: tl.tensor,
    width: tl.tensor,
) -> Any:
    """float32 [32, columns] of rows of a matrix; zeros from row `count` on and beside it."""
    is_inside = (row < count)[:, None] & (column < width)[None, :]
    return tl.load(values + row[:, None] * stride + column[None, :], mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def decode_quarter(
    source: tl.tuple,
    row: tl.tensor,
    count: tl.tensor,
    column: tl.tensor,
    is_column: tl.tensor,
    tile: tl.tensor,
    ONE_TILE: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> Any:
    """float32 [32, columns] of rows of cached tiles; zeros where there is none.

    Args:
        source: (codes, scales, distance of rows of codes, of rows of scales, of tiles of scales).
        tile: which the first column lies in.
        ONE_TILE: all columns lie in it, so a row has one scale here.
    """
    codes, scales, code_stride, row_stride, tile_stride = source
    is_row = row < count
    is_inside = is_row[:, None] & is_column[None, :]
    block = tl.load(codes + row[:, None] * code_stride + column[None, :], mask=is_inside, other=0)
    if ONE_TILE:
        place = scales + row * row_stride + tile.to(tl.int64) * tile_stride
        values = values_of(block, tl.load(place, mask=is_row, other=0.0), HARDWARE_CAST)
    else:
        tiles = (column // _TILE).to(tl.int64)
        place = scales + row[:, None] * row_stride + tiles[None, :] * tile_stride
        ones = tl.full(row.shape, 1.0, tl.float32)
        values = values_of(block, ones, HARDWARE_CAST) * tl.load(place, mask=is_inside, other=0.0)
    return values


@triton.jit
def cast_columns_kernel(
    values: tl.tensor,
    tile_rows: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    row_codes: tl.tensor,
    row_scales: tl.tensor,
    num_columns: int,
    row_stride: int,
    row_words: int,
    scale_stride: int,
    row_scale_stride: int,
    BOTH: tl.constexpr,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """COLUMNS columns of one tile of tokens, as columns and, with BOTH (128 columns then), as rows."""
    pieces = (num_columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    row = 4 * tl.arange(0, 32)
    source = values + first * row_stride
    v0 = read_quarter(source, row, count, row_stride, column, num_columns)
    v1 = read_quarter(source, row + 1, count, row_stride, column, num_columns)
    v2 = read_quarter(source, row + 2, count, row_stride, column, num_columns)
    v3 = read_quarter(source, row + 3, count, row_stride, column, num_columns)
    if BOTH:
        row_place = row_scales + piece.to(tl.int64) * row_scale_stride + first
        rows = (row_codes + first * num_columns, row_place)
        for step in tl.static_range(4):
            part = v0 if step == 0 else (v1 if step == 1 else (v2 if step == 2 else v3))
            at = row + step
            store_row_tile(part, rows, at, at < count, column, num_columns, POW2, HARDWARE_CAST)
    made = (words, scales, row_words, scale_stride)
    store_columns((v0, v1, v2, v3), made, tile, count, column, num_columns, POW2, HARDWARE_CAST)


def as_words(codes: Tensor) -> Tensor:
    """Codes whose rows are a multiple of 4 long, four to an int32."""
    return codes.view(torch.int32)


def _cast(
    x: Tensor,
    groups: Groups | None,
    rows: Tiles | None,
    hardware_cast: bool | None,
    columns: int,
    options: dict[str, int],
) -> Tiles:
    """Columns of x and, into `rows` if given, its rows."""
    groups = groups or Groups.one(x.shape[0], x.device)
    made = empty_tiles(x.shape[1], groups.num_padded, x.device)
    if made.codes.numel():
        cast_columns_kernel[(groups.num_padded // TILE * triton.cdiv(x.shape[1], columns),)](
            x,
            groups.tile_rows,
            as_words(made.codes),
            made.scales,
            None if rows is None else rows.codes,
            None if rows is None else rows.scales,
            x.shape[1],
            x.stride(0),
            made.codes.shape[1] // 4,
            made.scales.stride(1),
            0 if rows is None else rows.scales.stride(1),
            BOTH=rows is not None,
            POW2=True,
            HARDWARE_CAST=casts_in_hardware(x.device, hardware_cast),
            COLUMNS=columns,
            **options,
        )
    return made


def cast_columns_on_device(
    x: Tensor,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    columns: int = COLUMNS,
    num_warps: int = COLUMN_WARPS,
    max_registers: int | None = None,
) -> Tiles:
    """The transposed matrix in tiles along the tokens, each group's beginning at a multiple of 128.

    Args:
        x: [m, k] floating.
        groups: of the rows; None: one group.
        hardware_cast: round with the cast instruction; None: where the device has one.
        columns: of a program; a power of two up to 128.
        num_warps: of a program.
        max_registers: of a thread; None: as the compiler likes.

    Returns:
        Tiles [k, padded m].
    """
    return _cast(readable(x), groups, None, hardware_cast, columns, launch_options(num_warps, max_registers))


def cast_both_on_device(
    x: Tensor,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    num_warps: int | None = None,
    max_registers: int | None = None,
) -> tuple[Tiles, Tiles]:
    """Rows and columns of one matrix, read once; arguments as in `cast_columns_on_device`."""
    x = readable(x)
    is_hardware = casts_in_hardware(x.device, hardware_cast)
    warps = num_warps or (BOTH_WARPS if is_hardware else 2 * BOTH_WARPS)
    rows = empty_tiles(x.shape[0], x.shape[1], x.device)
    return rows, _cast(x, groups, rows, is_hardware, TILE, launch_options(warps, max_registers))
