"""Backward of SwiGLU joined with both casts of its gradient, on a GPU, in one pass.

With s = sigmoid(gate) and d the gradient of the product, times the row's weight:

    d_gate = d x up x s x (1 + gate x (1 - s))          d_up = d x gate x s
    d_weight of a row = sum over the columns of (d before the weight) x gate x s x up

A program makes 128 x 128 values of one half, d_gate or d_up, and writes them four times over: codes and
scales of rows, codes and scales of columns. Both halves in one program would need twice the registers,
which leaves a multiprocessor one program, with nothing to do while it waits. The second reader of d and
gate is the next program, and finds them in L2. The sum of a row's weight is given in parts, one a tile,
for atomic additions would change their order, and the bits, from run to run.
"""

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
from moe_runtime.fp8.cast_triton_tile import empty_tiles, has_cast_instruction, readable, sigmoid
from moe_runtime.fp8.tiled import TILE, Groups, Tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
WARPS = 8


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
) -> None:
    """128 tokens x 128 columns of d_gate or d_up; the width is a multiple of 128."""
    pieces = width // _TILE
    half = tl.program_id(0) % 2
    piece = tl.program_id(0) // 2 % pieces
    tile = tl.program_id(0) // 2 // pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    column = piece * _TILE + tl.arange(0, _TILE)
    made_column = column + half * width
    is_column = column < width
    factors = gate_up_scales + first * source_row_stride
    source = (gate_up + first * code_stride, factors, code_stride, source_row_stride, source_tile_stride)
    row_tile = (piece + half * pieces).to(tl.int64)
    rows = (row_codes + first * 2 * width, row_scales + row_tile * row_scale_stride + first)
    if WEIGHTED:
        parts = weight_parts + piece.to(tl.int64) * num_rows + first
    quarters = ()
    for step in tl.static_range(4):
        row = 4 * tl.arange(0, 32) + step
        is_row = row < count
        pull = read_quarter(d_product + first * d_stride, row, count, d_stride, column, width)
        gate = decode_quarter(source, row, count, column, is_column, piece, True, HARDWARE_CAST)
        open_part = sigmoid(gate, HARDWARE_CAST)
        slope = gate * open_part
        if half == 0:  # d_gate; `up` is read by this half alone
            up_column, up_at = column + width, piece + pieces
            up = decode_quarter(source, row, count, up_column, is_column, up_at, True, HARDWARE_CAST)
            if WEIGHTED:
                tl.store(parts + row, tl.sum(pull * slope * up, axis=1), mask=is_row)
            slope = up * open_part * (1.0 + gate * (1.0 - open_part))
        if WEIGHTED:
            pull *= tl.load(row_weights + first + row, mask=is_row, other=0.0)[:, None]
        made = pull * slope
        store_row_tile(made, rows, row, is_row, made_column, 2 * width, True, HARDWARE_CAST)
        quarters += (made,)  # type: ignore[assignment]
    columns = (words, scales, row_words, scale_stride)
    store_columns(quarters, columns, tile, count, made_column, 2 * width, True, HARDWARE_CAST)


def gated_backward_cast_on_device(
    d_product: Tensor,
    gate_up: Tiles,
    row_weights: Tensor | None = None,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    num_warps: int = WARPS,
    max_registers: int | None = None,
) -> tuple[Tiles, Tiles, Tensor | None]:
    """The gradient of gate_up in tiles both ways, and that of the row weights.

    Args:
        d_product: [m, f] floating, gradient of silu(gate) x up x weight.
        gate_up: [m, 2f] as cached.
        row_weights: [m] floating.
        groups: of the rows; None: one group.
        hardware_cast: use the conversion instructions; None: where the device has them.
        num_warps: of a program.
        max_registers: of a thread; None: as the compiler likes.

    Returns:
        (Tiles [m, 2f], Tiles [2f, padded m], float32 [m] or None). Where f is no multiple of 128, a row tile
        holds both gate and up, and steps of torch do it, slower.
    """
    d_product, device = readable(d_product), d_product.device
    rows, width = d_product.shape
    groups = groups or Groups.one(rows, device)
    weights = adjacent(row_weights)
    if width % TILE:
        return _in_steps(d_product, gate_up, weights, groups, hardware_cast)
    made, columns = empty_tiles(rows, 2 * width, device), empty_tiles(2 * width, groups.num_padded, device)
    parts = None if weights is None else torch.empty((width // TILE, rows), device=device)
    if made.codes.numel():
        gated_backward_kernel[(2 * groups.num_padded // TILE * (width // TILE),)](
            d_product,
            gate_up.codes,
            gate_up.scales,
            weights,
            groups.tile_rows,
            made.codes,
            made.scales,
            as_words(columns.codes),
            columns.scales,
            parts,
            rows,
            width,
            d_product.stride(0),
            gate_up.codes.stride(0),
            gate_up.scales.stride(0),
            gate_up.scales.stride(1),
            made.scales.stride(1),
            columns.codes.shape[1] // 4,
            columns.scales.stride(1),
            WEIGHTED=weights is not None,
            HARDWARE_CAST=has_cast_instruction(device) if hardware_cast is None else hardware_cast,
            num_warps=num_warps,
            **({} if max_registers is None else {"maxnreg": max_registers}),
        )
    return made, columns, None if parts is None else parts.sum(0)


def _in_steps(
    d_product: Tensor, gate_up: Tiles, weights: Tensor | None, groups: Groups, hardware_cast: bool | None
) -> tuple[Tiles, Tiles, Tensor | None]:
    """The same by single operations, for any width."""
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
