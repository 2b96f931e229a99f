"""Backward of SwiGLU joined with both casts of its gradient, on a GPU, in one pass.

With s = sigmoid(gate) and d the gradient of the product, times the row's weight:

    d_gate = d x up x s x (1 + gate x (1 - s))          d_up = d x gate x s
    d_weight of a row = sum over the columns of (d before the weight) x gate x s x up

A square of 128 x 128 values of each half, wanted four times over (codes and scales of rows, codes and scales
of columns), would fill the registers of a multiprocessor, which then has nothing to do while it waits: that
ran at a third of the copy's bandwidth. So no program makes the square. Eight small ones do, next to each
other in the launch: four make 32 rows of both halves and cast them along the features, four make 32 columns
and cast them along the tokens. Everything is computed twice and read twice, the second time from L2. The
sum of a row's weight is given in parts, one a tile, for atomic additions would change their order, and the
bits, from run to run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.cast_triton_columns import (
    as_words,
    cast_both_on_device,
    decode_quarter,
    read_quarter,
    store_columns,
    store_row_tile,
)
from moe_runtime.fp8.cast_triton_gated import adjacent
from moe_runtime.fp8.cast_triton_rows import decode_on_device
from moe_runtime.fp8.cast_triton_tile import (
    casts_in_hardware,
    empty_tiles,
    launch_options,
    readable,
    sigmoid,
)
from moe_runtime.fp8.tiled import TILE, Groups, Tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
COLUMNS, WARPS = 32, 4
REGISTERS = 80  # of a thread: a sixth program fits a multiprocessor


@triton.jit
def _gradients(
    source: tl.tuple,
    row: tl.tensor,
    count: tl.tensor,
    column: tl.tensor,
    piece: tl.tensor,
    width: tl.tensor,
    WEIGHTED: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
) -> Any:
    """(d_gate, d_up, d_weight of each element), float32 [rows, columns], zeros from row `count` on.

    Args:
        source: (d_product from the first row on, its row stride, cached tiles as `decode_quarter` takes them,
            row weights from the first row on or None).
        piece: which tile of the gate the columns lie in.
    """
    d_product, d_stride, tiles, row_weights = source
    is_column = column < width
    up_at = piece + width // _TILE
    pull = read_quarter(d_product, row, count, d_stride, column, width)
    gate = decode_quarter(tiles, row, count, column, is_column, piece, True, HARDWARE_CAST)
    up = decode_quarter(tiles, row, count, column + width, is_column, up_at, True, HARDWARE_CAST)
    open_part = sigmoid(gate, HARDWARE_CAST)
    active = gate * open_part
    slope = open_part * (1.0 + gate * (1.0 - open_part))
    part = pull * active * up
    if WEIGHTED:
        pull *= tl.load(row_weights + row, mask=row < count, other=0.0)[:, None]
    return pull * up * slope, pull * active, part


@triton.jit
def _store_rows(
    d_gate: tl.tensor,
    d_up: tl.tensor,
    target: tl.tuple,
    row: tl.tensor,
    is_row: tl.tensor,
    column: tl.tensor,
    piece: tl.tensor,
    width: tl.tensor,
    HARDWARE_CAST: tl.constexpr,
) -> None:
    """Cast rows of both halves; target: (codes of row 0, scale of its first tile, distance of tiles)."""
    codes, scale, scale_stride = target
    scale += piece.to(tl.int64) * scale_stride
    up_scale = scale + (width // _TILE).to(tl.int64) * scale_stride
    store_row_tile(d_gate, (codes, scale), row, is_row, column, 2 * width, True, HARDWARE_CAST)
    store_row_tile(d_up, (codes, up_scale), row, is_row, column + width, 2 * width, True, HARDWARE_CAST)


@triton.jit
def gated_backward_kernel(
    d_product: tl.tensor,
    gate_up: tl.tensor,
    gate_up_scales: tl.tensor,
    row_weights: tl.tensor,
    tile_rows: tl.tensor,
    row_codes: tl.tensor,
    row_scales: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    weight_parts: tl.tensor,
    num_rows: int,
    width: int,
    d_stride: int,
    code_stride: int,
    source_row_stride: int,
    source_tile_stride: int,
    row_scale_stride: int,
    row_words: int,
    scale_stride: int,
    WEIGHTED: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """32 rows x 128 columns, or COLUMNS columns x 128 tokens, of both halves; the width in whole tiles."""
    pieces = width // _TILE
    kinds: tl.constexpr = 4 + _TILE // COLUMNS
    kind = tl.program_id(0) % kinds
    piece = tl.program_id(0) // kinds % pieces
    tile = tl.program_id(0) // kinds // pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    factors = gate_up_scales + first * source_row_stride
    tiles = (gate_up + first * code_stride, factors, code_stride, source_row_stride, source_tile_stride)
    source = (d_product + first * d_stride, d_stride, tiles, row_weights + first if WEIGHTED else None)
    if kind < 4:
        row = kind * 32 + tl.arange(0, 32)
        column = piece * _TILE + tl.arange(0, _TILE)
        is_row = row < count
        d_gate, d_up, part = _gradients(source, row, count, column, piece, width, WEIGHTED, HARDWARE_CAST)
        if WEIGHTED:
            parts = weight_parts + piece.to(tl.int64) * num_rows + first
            tl.store(parts + row, tl.sum(part, axis=1), mask=is_row)
        target = (row_codes + first * 2 * width, row_scales + first, row_scale_stride)
        _store_rows(d_gate, d_up, target, row, is_row, column, piece, width, HARDWARE_CAST)
    else:
        narrow = piece * _TILE + (kind - 4) * COLUMNS + tl.arange(0, COLUMNS)
        gate_quarters = ()
        up_quarters = ()
        for step in tl.static_range(4):
            at = 4 * tl.arange(0, 32) + step
            gate_part, up_part, _ = _gradients(
                source, at, count, narrow, piece, width, WEIGHTED, HARDWARE_CAST
            )
            gate_quarters += (gate_part,)  # type: ignore[assignment]
            up_quarters += (up_part,)  # type: ignore[assignment]
        made = (words, scales, row_words, scale_stride)
        store_columns(gate_quarters, made, tile, count, narrow, 2 * width, True, HARDWARE_CAST)
        store_columns(up_quarters, made, tile, count, narrow + width, 2 * width, True, HARDWARE_CAST)


def gated_backward_cast_on_device(
    d_product: Tensor,
    gate_up: Tiles,
    row_weights: Tensor | None = None,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    columns: int = COLUMNS,
    max_registers: int | None = None,
) -> tuple[Tiles, Tiles, Tensor | None]:
    """The gradient of gate_up in tiles both ways, and that of the row weights.

    Args:
        d_product: [m, f] floating, gradient of silu(gate) x up x weight.
        gate_up: [m, 2f] as cached.
        row_weights: [m] floating.
        groups: of the rows; None: one group.
        hardware_cast: as in `cast_columns_on_device`.
        columns: of a program that makes columns; a power of two up to 128.
        max_registers: of a thread; None: REGISTERS with the conversion instructions, else the compiler's.

    Returns:
        (Tiles [m, 2f], Tiles [2f, padded m], float32 [m] or None). For f no multiple of 128: `_in_steps`.
    """
    d_product, device = readable(d_product), d_product.device
    rows, width = d_product.shape
    groups = groups or Groups.one(rows, device)
    weights = adjacent(row_weights)
    if width % TILE:
        return _in_steps(d_product, gate_up, weights, groups, hardware_cast)
    is_hardware = casts_in_hardware(device, hardware_cast)
    made, turned = empty_tiles(rows, 2 * width, device), empty_tiles(2 * width, groups.num_padded, device)
    parts = None if weights is None else torch.empty((width // TILE, rows), device=device)
    if made.codes.numel():
        gated_backward_kernel[((4 + TILE // columns) * (groups.num_padded // TILE) * (width // TILE),)](
            d_product,
            gate_up.codes,
            gate_up.scales,
            weights,
            groups.tile_rows,
            made.codes,
            made.scales,
            as_words(turned.codes),
            turned.scales,
            parts,
            rows,
            width,
            d_product.stride(0),
            gate_up.codes.stride(0),
            gate_up.scales.stride(0),
            gate_up.scales.stride(1),
            made.scales.stride(1),
            turned.codes.shape[1] // 4,
            turned.scales.stride(1),
            WEIGHTED=weights is not None,
            HARDWARE_CAST=is_hardware,
            COLUMNS=columns,
            **launch_options(WARPS, max_registers or (REGISTERS if is_hardware else None)),
        )
    return made, turned, None if parts is None else parts.sum(0)


def _in_steps(
    d_product: Tensor, gate_up: Tiles, weights: Tensor | None, groups: Groups, hardware_cast: bool | None
) -> tuple[Tiles, Tiles, Tensor | None]:
    """The same by single operations, slower, for any width: a row tile may hold both gate and up."""
    gate, up = decode_on_device(gate_up, hardware_cast=hardware_cast).chunk(2, dim=1)
    pull, open_part = d_product.float(), torch.sigmoid(gate)
    active = gate * open_part
    d_weights = None
    if weights is not None:
        d_weights = (pull * active * up).sum(1)
        pull = pull * weights.unsqueeze(1)
    d_gate = pull * (up * open_part * (1 + gate * (1 - open_part)))
    made = torch.cat([d_gate, pull * active], dim=1)
    return *cast_both_on_device(made, groups, hardware_cast=hardware_cast), d_weights
