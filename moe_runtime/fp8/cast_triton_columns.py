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
    empty_tiles,
    encode,
    encode_joined,
    has_cast_instruction,
    larger_of,
    magnitude_of,
    readable,
    scales_of,
    values_of,
    word_mask,
)
from moe_runtime.fp8.tiled import TILE, Groups, Tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
COLUMNS, COLUMN_WARPS = 64, 4  # of a program of `cast_columns`: 16 KiB of BF16
BOTH_WARPS = 8  # `cast_both` needs 128 columns, for it makes row tiles too
RETILE_COLUMNS, RETILE_WARPS = 128, 8


@triton.jit
def column_scales(
    v0: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    v3: tl.tensor,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> Any:
    """(inverse, scale) of each column of four quarters [32, columns]."""
    low = larger_of(magnitude_of(v0, HARDWARE_CAST), magnitude_of(v1, HARDWARE_CAST), HARDWARE_CAST)
    high = larger_of(magnitude_of(v2, HARDWARE_CAST), magnitude_of(v3, HARDWARE_CAST), HARDWARE_CAST)
    return scales_of(amax_bits(larger_of(low, high, HARDWARE_CAST), 0, HARDWARE_CAST), POW2)


@triton.jit
def store_columns(
    v0: tl.tensor,
    v1: tl.tensor,
    v2: tl.tensor,
    v3: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    tile: tl.tensor,
    count: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
    row_words: tl.tensor,
    scale_stride: tl.tensor,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """Cast four quarters [32, columns] of 128 tokens along the tokens and write them transposed.

    Args:
        words: int32 [num_columns, row_words], four codes a word.
        scales: float32 at [tile, column], tiles `scale_stride` apart.
    """
    inverse, scale = column_scales(v0, v1, v2, v3, POW2, HARDWARE_CAST)
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
    codes: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    column: tl.tensor,
    num_columns: tl.tensor,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """Cast rows [32, 128], one tile each, and write them at `row` and `column` of [.., num_columns].

    Args:
        scales: where the tile's scale of row 0 lies.
    """
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
        target = row_codes + first * num_columns
        place = row_scales + piece.to(tl.int64) * row_scale_stride + first
        for step in tl.static_range(4):
            part = v0 if step == 0 else (v1 if step == 1 else (v2 if step == 2 else v3))
            at = row + step
            store_row_tile(part, target, place, at, at < count, column, num_columns, POW2, HARDWARE_CAST)
    store_columns(
        v0,
        v1,
        v2,
        v3,
        words,
        scales,
        tile,
        count,
        column,
        num_columns,
        row_words,
        scale_stride,
        POW2,
        HARDWARE_CAST,
    )


@triton.jit
def decode_quarter(
    codes: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    code_stride: tl.tensor,
    row_scale_stride: tl.tensor,
    tile_scale_stride: tl.tensor,
    column: tl.tensor,
    is_column: tl.tensor,
    tile: tl.tensor,
    ONE_TILE: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> Any:
    """float32 [32, columns] of rows of cached tiles; zeros where there is none.

    Args:
        tile: which the first column lies in.
        ONE_TILE: all columns lie in it, so a row has one scale here.
    """
    is_row = row < count
    is_inside = is_row[:, None] & is_column[None, :]
    block = tl.load(codes + row[:, None] * code_stride + column[None, :], mask=is_inside, other=0)
    if ONE_TILE:
        place = scales + row * row_scale_stride + tile.to(tl.int64) * tile_scale_stride
        values = values_of(block, tl.load(place, mask=is_row, other=0.0), HARDWARE_CAST)
    else:
        tiles = (column // _TILE).to(tl.int64)
        place = scales + row[:, None] * row_scale_stride + tiles[None, :] * tile_scale_stride
        ones = tl.full(row.shape, 1.0, tl.float32)
        values = values_of(block, ones, HARDWARE_CAST) * tl.load(place, mask=is_inside, other=0.0)
    return values


@triton.jit
def columns_of_kernel(
    codes: tl.tensor,
    row_scales: tl.tensor,
    tile_rows: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    num_columns: int,
    code_stride: int,
    row_scale_stride: int,
    tile_scale_stride: int,
    row_words: int,
    scale_stride: int,
    HARDWARE_CAST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """COLUMNS columns of one tile of tokens, from tiles along the other axis."""
    pieces = (num_columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    row = 4 * tl.arange(0, 32)
    source = codes + first * code_stride
    factors = row_scales + first * row_scale_stride
    quarters = ()
    for step in tl.static_range(4):
        quarter = decode_quarter(
            source,
            factors,
            row + step,
            count,
            code_stride,
            row_scale_stride,
            tile_scale_stride,
            column,
            is_column,
            piece * COLUMNS // _TILE,
            True,
            HARDWARE_CAST,
        )
        quarters += (quarter,)  # type: ignore[assignment]
    store_columns(
        quarters[0],
        quarters[1],
        quarters[2],
        quarters[3],
        words,
        scales,
        tile,
        count,
        column,
        num_columns,
        row_words,
        scale_stride,
        True,
        HARDWARE_CAST,
    )


def as_words(codes: Tensor) -> Tensor:
    """Codes whose rows are a multiple of 4 long, four to an int32."""
    return codes.view(torch.int32)


def _cast(
    x: Tensor,
    groups: Groups | None,
    rows: Tiles | None,
    hardware_cast: bool | None,
    columns: int,
    num_warps: int,
    pow2: bool,
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
            POW2=pow2,
            HARDWARE_CAST=has_cast_instruction(x.device) if hardware_cast is None else hardware_cast,
            COLUMNS=columns,
            num_warps=num_warps,
        )
    return made


def cast_columns_on_device(
    x: Tensor,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    columns: int = COLUMNS,
    num_warps: int = COLUMN_WARPS,
) -> Tiles:
    """The transposed matrix in tiles along the tokens, each group's beginning at a multiple of 128.

    Args:
        x: [m, k] floating.
        groups: of the rows; None: one group.
        hardware_cast: round with the cast instruction; None: where the device has one.
        columns: of a program; a power of two up to 128.
        num_warps: of a program.

    Returns:
        Tiles [k, padded m].
    """
    return _cast(readable(x), groups, None, hardware_cast, columns, num_warps, True)


def cast_both_on_device(
    x: Tensor,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    num_warps: int = BOTH_WARPS,
) -> tuple[Tiles, Tiles]:
    """Rows and columns of one matrix, read once; arguments as in `cast_columns_on_device`."""
    x = readable(x)
    rows = empty_tiles(*x.shape, x.device)
    return rows, _cast(x, groups, rows, hardware_cast, TILE, num_warps, True)


def columns_of_on_device(
    tiles: Tiles,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    columns: int = RETILE_COLUMNS,
    num_warps: int = RETILE_WARPS,
) -> Tiles:
    """Tiles along the tokens from tiles along the features, for a weight gradient.

    Args:
        tiles: [m, k] with scales that are powers of two: then a value is exact and rounded once more.
        groups: of the rows; None: one group.
        hardware_cast: use the conversion instructions; None: where the device has them.
        columns: of a program; a power of two up to 128.
        num_warps: of a program.

    Returns:
        Tiles [k, padded m].
    """
    codes = tiles.codes
    groups = groups or Groups.one(codes.shape[0], codes.device)
    made = empty_tiles(codes.shape[1], groups.num_padded, codes.device)
    if made.codes.numel():
        columns_of_kernel[(groups.num_padded // TILE * triton.cdiv(codes.shape[1], columns),)](
            codes,
            tiles.scales,
            groups.tile_rows,
            as_words(made.codes),
            made.scales,
            codes.shape[1],
            codes.stride(0),
            tiles.scales.stride(0),
            tiles.scales.stride(1),
            made.codes.shape[1] // 4,
            made.scales.stride(1),
            HARDWARE_CAST=has_cast_instruction(codes.device) if hardware_cast is None else hardware_cast,
            COLUMNS=columns,
            num_warps=num_warps,
        )
    return made
