"""SwiGLU joined with its cast on a GPU: the product lives in registers only.

    product = silu(gate) x up (x the row's weight),   silu(g) = g / (1 + exp(-g))

All in FP32. Two ways to it: from gate_up in BF16, as the up projection gives it, and, for the weight
gradient of the down projection, made again from the FP8 that was cached, as columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.cast_triton_columns import as_words, decode_quarter, store_columns
from moe_runtime.fp8.cast_triton_tile import (
    amax_bits,
    casts_in_hardware,
    empty_tiles,
    encode,
    launch_options,
    magnitude_of,
    readable,
    scales_of,
    sigmoid,
)
from moe_runtime.fp8.tiled import TILE, Groups, Tiles, num_tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
ROWS, WARPS = 64, 8
REMAKE_COLUMNS, REMAKE_WARPS = 64, 4


@triton.jit
def cast_gated_kernel(
    gate_up: tl.tensor,
    row_weights: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: int,
    width: int,
    row_stride: int,
    scale_stride: int,
    WEIGHTED: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One tile of the product of each of ROWS rows."""
    tiles = (width + _TILE - 1) // _TILE
    first = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    tile = tl.program_id(0) % tiles
    row = tl.arange(0, ROWS)
    column = tile * _TILE + tl.arange(0, _TILE)
    is_row = row < num_rows - first
    is_inside = is_row[:, None] & (column < width)[None, :]
    source = gate_up + first * row_stride + row[:, None] * row_stride + column[None, :]
    gate_read = tl.load(source, mask=is_inside, other=0.0)
    up_read = tl.load(source + width, mask=is_inside, other=0.0)
    gate = gate_read.to(tl.float32)
    product = gate * sigmoid(gate, HARDWARE_CAST) * up_read.to(tl.float32)
    if WEIGHTED:
        weights = tl.load(row_weights + first + row, mask=is_row, other=0.0).to(tl.float32)
        product *= weights[:, None]
    bits = amax_bits(magnitude_of(product, HARDWARE_CAST), 1, HARDWARE_CAST)
    inverse, scale = scales_of(bits, True)
    target = codes + first * width + row[:, None] * width + column[None, :]
    tl.store(target, encode(product * inverse[:, None], HARDWARE_CAST), mask=is_inside)
    tl.store(scales + tile.to(tl.int64) * scale_stride + first + row, scale, mask=is_row)


@triton.jit
def cast_gated_tiles_kernel(
    gate_up: tl.tensor,
    gate_up_scales: tl.tensor,
    row_weights: tl.tensor,
    tile_rows: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    width: int,
    code_stride: int,
    row_scale_stride: int,
    tile_scale_stride: int,
    row_words: int,
    scale_stride: int,
    ALIGNED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """COLUMNS columns of the product of one tile of tokens. ALIGNED: width is a multiple of 128."""
    pieces = (width + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    column = piece * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    factors = gate_up_scales + first * row_scale_stride
    source = (gate_up + first * code_stride, factors, code_stride, row_scale_stride, tile_scale_stride)
    gate_at, up_at = piece * COLUMNS // _TILE, (width + piece * COLUMNS) // _TILE
    quarters = ()
    for step in tl.static_range(4):
        row = 4 * tl.arange(0, 32) + step
        gate = decode_quarter(source, row, count, column, is_column, gate_at, True, HARDWARE_CAST)
        up = decode_quarter(source, row, count, column + width, is_column, up_at, ALIGNED, HARDWARE_CAST)
        product = gate * sigmoid(gate, HARDWARE_CAST) * up
        if WEIGHTED:
            weights = tl.load(row_weights + first + row, mask=row < count, other=0.0).to(tl.float32)
            product *= weights[:, None]
        quarters += (product,)  # type: ignore[assignment]
    made = (words, scales, row_words, scale_stride)
    store_columns(quarters, made, tile, count, column, width, True, HARDWARE_CAST)


def cast_gated_on_device(
    gate_up: Tensor,
    row_weights: Tensor | None = None,
    *,
    hardware_cast: bool | None = None,
    rows: int = ROWS,
    num_warps: int = WARPS,
) -> Tiles:
    """SwiGLU's product in tiles.

    Args:
        gate_up: [m, 2f] floating, gate first.
        row_weights: [m] floating.
        hardware_cast: use the cast instruction; None: where the device has one.
        rows: of a program; a power of two.
        num_warps: of a program.

    Returns:
        Tiles [m, f].
    """
    gate_up = readable(gate_up)
    width = gate_up.shape[1] // 2
    made = empty_tiles(gate_up.shape[0], width, gate_up.device)
    if made.codes.numel():
        cast_gated_kernel[(triton.cdiv(gate_up.shape[0], rows) * num_tiles(width),)](
            gate_up,
            adjacent(row_weights),
            made.codes,
            made.scales,
            gate_up.shape[0],
            width,
            gate_up.stride(0),
            made.scales.stride(1),
            WEIGHTED=row_weights is not None,
            HARDWARE_CAST=casts_in_hardware(gate_up.device, hardware_cast),
            ROWS=rows,
            num_warps=num_warps,
        )
    return made


def adjacent(row_weights: Tensor | None) -> Tensor | None:
    """Weights side by side, in a dtype that kernels read."""
    if row_weights is None:
        return None
    return row_weights.to(torch.float32).contiguous()


def cast_gated_tiles_on_device(
    gate_up: Tiles,
    row_weights: Tensor | None = None,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    columns: int = REMAKE_COLUMNS,
    num_warps: int = REMAKE_WARPS,
    max_registers: int | None = None,
) -> Tiles:
    """SwiGLU's product made again from cached FP8, in tiles along the tokens.

    Args:
        gate_up: [m, 2f], gate first.
        row_weights: [m] floating.
        groups: of the rows; None: one group.
        hardware_cast: use the conversion instructions; None: where the device has them.
        columns: of a program; a power of two up to 128.
        num_warps: of a program.
        max_registers: of a thread; None: as the compiler likes.

    Returns:
        Tiles [f, padded m].
    """
    codes, width = gate_up.codes, gate_up.shape[1] // 2
    groups = groups or Groups.one(codes.shape[0], codes.device)
    made = empty_tiles(width, groups.num_padded, codes.device)
    if made.codes.numel():
        cast_gated_tiles_kernel[(groups.num_padded // TILE * triton.cdiv(width, columns),)](
            codes,
            gate_up.scales,
            adjacent(row_weights),
            groups.tile_rows,
            as_words(made.codes),
            made.scales,
            width,
            codes.stride(0),
            gate_up.scales.stride(0),
            gate_up.scales.stride(1),
            made.codes.shape[1] // 4,
            made.scales.stride(1),
            ALIGNED=width % TILE == 0,
            WEIGHTED=row_weights is not None,
            HARDWARE_CAST=casts_in_hardware(codes.device, hardware_cast),
            COLUMNS=columns,
            **launch_options(num_warps, max_registers),
        )
    return made
