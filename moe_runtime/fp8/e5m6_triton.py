"""E5M6 on a GPU: packing, unpacking, and columns in E4M3 from packed rows. `e5m6.py` says what the bits are.

Each kernel is bound by memory: packing moves 2 + 1.5 bytes an element of BF16, unpacking 1.5 + 2, columns
1.5 + 1. A byte of lower bits belongs to two neighbours; a thread holds several elements of a row, so taking
them apart and joining them stays within its registers.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.cast_triton_columns import as_words, store_columns
from moe_runtime.fp8.cast_triton_tile import casts_in_hardware, empty_tiles, readable, rounded
from moe_runtime.fp8.e5m6 import NAN_CODE, Packed, packed_width
from moe_runtime.fp8.tiled import TILE, Groups, Tiles, num_tiles

_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_QUIET_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_FLOOR_BITS: tl.constexpr = tl.constexpr((127 - 90) << 23)
_SMALLEST_NORMAL: tl.constexpr = tl.constexpr(127 - 14)
_NAN_CODE: tl.constexpr = tl.constexpr(NAN_CODE)
_TILE: tl.constexpr = tl.constexpr(TILE)
ROWS, WARPS = 32, 4  # of a program
COLUMN_WARPS = 8


@triton.jit
def round_e5m6(scaled: tl.tensor) -> Any:
    """int32 codes of float32 numbers that the format holds; see `round_to_codes`."""
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    exponent = tl.maximum(magnitude >> 23, _SMALLEST_NORMAL)
    anchor = (exponent + 17) << 23
    total = magnitude.to(tl.float32, bitcast=True) + anchor.to(tl.float32, bitcast=True)
    quanta = total.to(tl.int32, bitcast=True) - anchor
    return (((exponent - _SMALLEST_NORMAL) << 6) + quanta) | ((bits >> 20) & 0x800)


@triton.jit
def pack_kernel(
    values: tl.tensor,
    data: tl.tensor,
    scales: tl.tensor,
    num_rows: int,
    num_columns: int,
    row_stride: int,
    row_bytes: int,
    ROWS: tl.constexpr,
) -> None:
    """One tile of each of ROWS rows."""
    tiles = (num_columns + _TILE - 1) // _TILE
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    tile = tl.program_id(0) % tiles
    row = tl.arange(0, ROWS)
    column = tile * _TILE + tl.arange(0, _TILE)
    is_row = row < num_rows - first
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    source = values + first * row_stride + row[:, None] * row_stride + column[None, :]
    block = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
    bits = tl.max(block.to(tl.int32, bitcast=True) & _MAGNITUDE, axis=1)
    is_finite = bits < _INFINITY
    exponent = ((tl.maximum(bits, _FLOOR_BITS) + 0x1FFFF) >> 23) - 15
    inverse = tl.where(is_finite, (254 - exponent) << 23, 0).to(tl.float32, bitcast=True)
    scale = tl.where(is_finite, exponent << 23, _QUIET_NAN).to(tl.float32, bitcast=True)
    codes = tl.where(is_finite[:, None], round_e5m6(block * inverse[:, None]), _NAN_CODE)
    codes = tl.where(is_inside, codes, 0)
    place = data + first * row_bytes + row[:, None] * row_bytes
    tl.store(place + column[None, :], (codes >> 4).to(tl.uint8), mask=is_inside)
    even, odd = tl.split(tl.reshape(codes & 0xF, (ROWS, _TILE // 2, 2)))
    pair = tile * (_TILE // 2) + tl.arange(0, _TILE // 2)
    is_pair = is_row[:, None] & (pair < (num_columns + 1) // 2)[None, :]
    tl.store(place + num_columns + pair[None, :], (even | (odd << 4)).to(tl.uint8), mask=is_pair)
    tl.store(scales + (first + row) * tiles + tile, scale, mask=is_row)


@triton.jit
def read_packed(
    data: tl.tensor,
    scales: tl.tensor,
    row: tl.tensor,
    count: tl.tensor,
    num_columns: tl.tensor,
    row_bytes: tl.tensor,
    tile: tl.tensor,
    ROWS: tl.constexpr,
) -> Any:
    """float32 [ROWS, 128] of one tile of packed rows; zeros from row `count` on and beside the matrix."""
    tiles = (num_columns + _TILE - 1) // _TILE
    column = tile * _TILE + tl.arange(0, _TILE)
    pair = tile * (_TILE // 2) + tl.arange(0, _TILE // 2)
    is_row = (row < count)[:, None]
    place = data + row[:, None] * row_bytes
    is_inside = is_row & (column < num_columns)[None, :]
    is_pair = is_row & (pair < (num_columns + 1) // 2)[None, :]
    upper = tl.load(place + column[None, :], mask=is_inside, other=0).to(tl.int16)
    lower = tl.load(place + num_columns + pair[None, :], mask=is_pair, other=0).to(tl.int16)
    both = tl.reshape(tl.join((lower & 0xF) << 4, lower & 0xF0), (ROWS, _TILE))
    halves = ((upper << 8) | both).to(tl.float16, bitcast=True)
    scale = tl.load(scales + row * tiles + tile, mask=row < count, other=0.0)
    return halves.to(tl.float32) * scale[:, None]


@triton.jit
def unpack_kernel(
    data: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    num_rows: int,
    num_columns: int,
    row_bytes: int,
    HARDWARE_CAST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Values of one tile of each of ROWS rows."""
    tiles = (num_columns + _TILE - 1) // _TILE
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tile * _TILE + tl.arange(0, _TILE)
    block = read_packed(data, scales, row, num_rows, num_columns, row_bytes, tile, ROWS)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    place = values + row[:, None] * num_columns + column[None, :]
    tl.store(place, rounded(block, values.dtype.element_ty, HARDWARE_CAST), mask=is_inside)


@triton.jit
def columns_of_packed_kernel(
    data: tl.tensor,
    row_scales: tl.tensor,
    tile_rows: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    num_columns: int,
    row_bytes: int,
    row_words: int,
    scale_stride: int,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """128 columns of one tile of tokens."""
    pieces = (num_columns + _TILE - 1) // _TILE
    tile = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    row = 4 * tl.arange(0, 32)
    source, factors = data + first * row_bytes, row_scales + first * pieces
    v0 = read_packed(source, factors, row, count, num_columns, row_bytes, piece, 32)
    v1 = read_packed(source, factors, row + 1, count, num_columns, row_bytes, piece, 32)
    v2 = read_packed(source, factors, row + 2, count, num_columns, row_bytes, piece, 32)
    v3 = read_packed(source, factors, row + 3, count, num_columns, row_bytes, piece, 32)
    target = (words, scales, row_words, scale_stride)
    column = piece * _TILE + tl.arange(0, _TILE)
    store_columns((v0, v1, v2, v3), target, tile, count, column, num_columns, True, HARDWARE_CAST)


def pack_e5m6_on_device(x: Tensor, *, rows: int = ROWS, num_warps: int = WARPS) -> Packed:
    """See `pack_e5m6`; x [m, k] floating."""
    x = readable(x)
    num_rows, columns = x.shape
    data = torch.empty(num_rows, packed_width(columns), dtype=torch.uint8, device=x.device)
    scales = torch.empty(num_rows, num_tiles(columns), device=x.device)
    if x.numel():
        pack_kernel[(triton.cdiv(num_rows, rows) * num_tiles(columns),)](
            x,
            data,
            scales,
            num_rows,
            columns,
            x.stride(0),
            data.shape[1],
            ROWS=rows,
            num_warps=num_warps,
        )
    return Packed(data, scales, columns)


def unpack_e5m6_on_device(
    packed: Packed,
    dtype: torch.dtype = torch.float32,
    *,
    hardware_cast: bool | None = None,
    rows: int = ROWS,
    num_warps: int = WARPS,
) -> Tensor:
    """See `unpack_e5m6`; dtype float32, bfloat16, float16 or float64."""
    num_rows, columns = packed.shape
    wide = torch.float32 if dtype == torch.float64 else dtype
    values = torch.empty(num_rows, columns, dtype=wide, device=packed.data.device)
    if values.numel():
        unpack_kernel[(triton.cdiv(num_rows, rows) * num_tiles(columns),)](
            packed.data,
            packed.scales,
            values,
            num_rows,
            columns,
            packed.data.shape[1],
            HARDWARE_CAST=casts_in_hardware(values.device, hardware_cast),
            ROWS=rows,
            num_warps=num_warps,
        )
    return values.to(dtype)


def columns_of_packed_on_device(
    packed: Packed,
    groups: Groups,
    *,
    hardware_cast: bool | None = None,
    num_warps: int = COLUMN_WARPS,
) -> Tiles:
    """See `columns_of_packed`."""
    device = packed.data.device
    made = empty_tiles(packed.columns, groups.num_padded, device)
    if made.codes.numel():
        columns_of_packed_kernel[(groups.num_padded // TILE * num_tiles(packed.columns),)](
            packed.data,
            packed.scales,
            groups.tile_rows,
            as_words(made.codes),
            made.scales,
            packed.columns,
            packed.data.shape[1],
            made.codes.shape[1] // 4,
            made.scales.stride(1),
            HARDWARE_CAST=casts_in_hardware(device, hardware_cast),
            num_warps=num_warps,
        )
    return made
