"""Weighted sums of a token's rows, and their backwards.

Bytes, at 8,192 tokens x 7,168 in BF16, top-8 (65,536 rows):

                                       read      written   together
    `sum_rows`                         0.94 GB   0.12 GB   1.06 GB
    `sum_rows_backward`, rows only     0.12 GB   0.94 GB   1.06 GB
    `sum_rows_backward`, with weights  1.06 GB   0.94 GB   2.00 GB

Each row is read once and each sum written once, which is the least possible: the sum is held in FP32
registers and no [tokens, top_k, hidden] exists. A program takes one piece of one token, so a row's
piece is wherever its index says and the additions are in the order of the choices, ((c0 + c1) + c2) ...,
whatever the timing: bits equal those of a loop, and of the CPU form up to exact ties of BF16. Products
are rounded before they are added (no fused multiply-add), for the same reason.
Rows are asked for four at a time, and the compiled code has two to four of those loads under way before
the first addition: by its registers 64 to 96 KiB a multiprocessor (computed, not timed).

A *bag* is the rows of one token: `indices[offsets[b] : offsets[b + 1]]`. Bags may have any length, also
none (the sum is zero), and indices below zero are skipped; so [tokens, top_k] slot rows with -1 for
unused choices serve as bags of equal length without compaction, for which the host would have to wait
for a count.

The gradient of a weight is the dot product of its row and the token's gradient. Each program gives the
part of its piece, [n, pieces] numbers in all, and a second, small sum joins them. Adding parts
atomically would save it, at the price of bits that change from run to run.

BF16 is rounded in integers, to nearest, ties to even: Triton's interpreter truncates in its own cast,
and a sum has one rounding against top_k wide loads.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_comm.errors import InputError
from moe_comm.kernels.launch import NUM_WARPS, check_rows, piece_columns, vector_bytes

ROWS_AT_ONCE = 4


@triton.jit
def narrow(values: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """float32 (or float64) values rounded to DTYPE, to nearest even, the same bits everywhere."""
    if DTYPE is tl.bfloat16:
        single = values.to(tl.float32)
        bits = single.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(single != single, 0x7FC0, rounded)  # the carry would turn NaN into a number
        result = rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(DTYPE)
    return result


@triton.jit
def bag_bounds(offsets: tl.tensor, bag: tl.tensor, length: int) -> Any:
    """First and last + 1 place of a bag: by `offsets`, or of `length` each if there are none."""
    if offsets is None:
        first = bag * length
        end = first + length
    else:
        first = tl.load(offsets + bag)
        end = tl.load(offsets + bag + 1)
    return first, end


@triton.jit
def sum_rows_kernel(
    rows: tl.tensor,
    indices: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    sums: tl.tensor,
    row_stride: int,
    sum_stride: int,
    length: int,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    AT_ONCE: tl.constexpr,
    READ_ALIGN: tl.constexpr,
    WRITE_ALIGN: tl.constexpr,
) -> None:
    """One piece of the sum of one bag."""
    pieces: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    bag = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < COLUMNS
    first, end = bag_bounds(offsets, bag, length)
    total = tl.zeros([BLOCK], WIDE)
    while first < end:  # not a range: the interpreter cannot take a tensor's value as the bound of one
        # In three steps, or the first addition would stand, and wait, before the second load.
        found, asked = (), ()
        for step in tl.static_range(AT_ONCE):
            place = first + step
            found += (tl.load(indices + place, mask=place < end, other=-1),)  # type: ignore[assignment]
        for step in tl.static_range(AT_ONCE):
            source = tl.multiple_of(rows + found[step] * row_stride + column, READ_ALIGN)
            values = tl.load(source, mask=is_column & (found[step] >= 0), other=0.0)
            asked += (values,)  # type: ignore[assignment]
        for step in tl.static_range(AT_ONCE):
            values = asked[step].to(WIDE)
            if WEIGHTED:
                values *= tl.load(weights + first + step, mask=found[step] >= 0, other=0.0).to(WIDE)
            total += values  # a skipped row adds +0.0, which changes no bit of a sum that began at +0.0
        first += AT_ONCE
    target = tl.multiple_of(sums + bag * sum_stride + column, WRITE_ALIGN)
    tl.store(target, narrow(total, sums.dtype.element_ty), mask=is_column, cache_modifier=".cs")


@triton.jit
def sum_rows_backward_kernel(
    d_sums: tl.tensor,
    rows: tl.tensor,
    indices: tl.tensor,
    offsets: tl.tensor,
    weights: tl.tensor,
    d_rows: tl.tensor,
    d_weight_parts: tl.tensor,
    d_sum_stride: int,
    row_stride: int,
    d_row_stride: int,
    length: int,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    WIDE: tl.constexpr,
    READ_ALIGN: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    WRITE_ALIGN: tl.constexpr,
) -> None:
    """One piece of the gradients of the rows of one bag, and its part of those of the weights."""
    pieces: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    bag = (tl.program_id(0) // pieces).to(tl.int64)
    piece = tl.program_id(0) % pieces
    column = piece * BLOCK + tl.arange(0, BLOCK)
    is_column = column < COLUMNS
    first, end = bag_bounds(offsets, bag, length)
    d_sum_place = tl.multiple_of(d_sums + bag * d_sum_stride + column, READ_ALIGN)
    d_sum = tl.load(d_sum_place, mask=is_column, other=0.0)
    place = first
    while place < end:
        row = tl.load(indices + place)
        is_place = is_column & (row >= 0)
        d_row = d_sum
        if WEIGHT_GRADIENT:
            source = tl.multiple_of(rows + row * row_stride + column, ROW_ALIGN)
            values = tl.load(source, mask=is_place, other=0.0).to(WIDE)
            part = tl.sum(values * d_sum.to(WIDE), axis=0)
            tl.store(d_weight_parts + place * pieces + piece, part)
        if WEIGHTED:
            weight = tl.load(weights + place).to(WIDE)
            d_row = narrow(d_sum.to(WIDE) * weight, d_rows.dtype.element_ty)
        target = tl.multiple_of(d_rows + row * d_row_stride + column, WRITE_ALIGN)
        tl.store(target, d_row, mask=is_place, cache_modifier=".cs")
        place += 1


def sum_rows(
    rows: Tensor,
    indices: Tensor,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    sums: Tensor | None = None,
) -> Tensor:
    """Sum the rows of each bag in order, in at least FP32, and round once.

    Args:
        rows: [rows, hidden] floating, rows at any distance (a view of records will do).
        indices: int64 [n] rows of all bags, one bag after another, with `offsets`; or int64
            [bags, top_k] without. Below zero: skipped.
        offsets: int64 [bags + 1] where each bag begins; None for [bags, top_k].
        weights: floating, shaped as indices; None for ones.
        sums: [bags, hidden] of the dtype of rows, written in place; a new one if None.

    Returns:
        sums. BF16 is rounded to nearest, ties to even.

    Raises:
        InputError: tensors that do not fit together.
    """
    columns = rows.shape[-1]
    num_bags = _check_bags(indices, offsets, weights)
    if sums is None:
        sums = rows.new_empty((num_bags, columns))
    check_rows(rows, "rows")
    check_rows(sums, "sums", columns=columns, dtype=rows.dtype)
    block = piece_columns(columns, rows.element_size())
    if sums.numel():
        sum_rows_kernel[(num_bags * triton.cdiv(columns, block),)](
            rows,
            indices.contiguous(),
            offsets,
            weights if weights is None else weights.contiguous(),
            sums,
            rows.stride(0),
            sums.stride(0),
            _length(indices),
            COLUMNS=columns,
            BLOCK=block,
            WEIGHTED=weights is not None,
            WIDE=_wide(rows.dtype),
            AT_ONCE=ROWS_AT_ONCE,
            READ_ALIGN=vector_bytes(rows),
            WRITE_ALIGN=vector_bytes(sums),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return sums


def sum_rows_backward(
    d_sums: Tensor,
    indices: Tensor,
    d_rows: Tensor,
    offsets: Tensor | None = None,
    weights: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor | None:
    """Backward of `sum_rows`: gradients of the rows and, given the rows, of the weights.

    Args:
        d_sums: [bags, hidden] gradients of the sums, rows at any distance.
        indices: as in `sum_rows`; each row in at most one bag, once.
        d_rows: [rows, hidden] of the dtype of d_sums, written in place, rows at any distance: weight
            times d_sums of the bag, rounded once. Rows in no bag are left as they are.
        offsets: as in `sum_rows`.
        weights: as in `sum_rows`.
        rows: [rows, hidden] that were summed, of the dtype of d_sums; None if no gradient of the
            weights is wanted.

    Returns:
        Gradients of the weights, float32 (float64 for float64 rows) as indices, 0 where an index is
        negative; None without rows.

    Raises:
        InputError: tensors that do not fit together.
    """
    columns = d_sums.shape[-1]
    num_bags = _check_bags(indices, offsets, weights)
    _check_gradients(d_sums, d_rows, rows, num_bags)
    block = piece_columns(columns, d_sums.element_size())
    pieces = triton.cdiv(columns, block)
    wide = torch.promote_types(torch.float32, d_sums.dtype)
    parts = None if rows is None else d_sums.new_empty((*indices.shape, pieces), dtype=wide)
    if d_sums.numel():
        sum_rows_backward_kernel[(num_bags * pieces,)](
            d_sums,
            rows,
            indices.contiguous(),
            offsets,
            weights if weights is None else weights.contiguous(),
            d_rows,
            parts,
            d_sums.stride(0),
            0 if rows is None else rows.stride(0),
            d_rows.stride(0),
            _length(indices),
            COLUMNS=columns,
            BLOCK=block,
            WEIGHTED=weights is not None,
            WEIGHT_GRADIENT=rows is not None,
            WIDE=_wide(d_sums.dtype),
            READ_ALIGN=vector_bytes(d_sums),
            ROW_ALIGN=1 if rows is None else vector_bytes(rows),
            WRITE_ALIGN=vector_bytes(d_rows),
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,
        )
    return None if parts is None else parts.sum(-1)


def _check_gradients(d_sums: Tensor, d_rows: Tensor, rows: Tensor | None, num_bags: int) -> None:
    columns = d_sums.shape[-1]
    check_rows(d_sums, "d_sums")
    check_rows(d_rows, "d_rows", columns=columns, dtype=d_sums.dtype)
    if d_sums.shape[0] != num_bags:
        raise InputError(f"kernels: expected d_sums of {num_bags} bags, got {d_sums.shape[0]}")
    if rows is not None:
        check_rows(rows, "rows", columns=columns, dtype=d_sums.dtype)


def _wide(dtype: torch.dtype) -> Any:
    """The dtype that sums of `dtype` are made in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def _length(indices: Tensor) -> int:
    """Indices of each bag, where bags are of one length."""
    return indices.shape[-1] if indices.dim() == 2 else 0


def _check_bags(indices: Tensor, offsets: Tensor | None, weights: Tensor | None) -> int:
    """The number of bags, once the three tensors are known to fit together."""
    expected_axes = 2 if offsets is None else 1
    if indices.dtype != torch.int64 or indices.dim() != expected_axes:
        shape = "[bags, top_k]" if offsets is None else "[n] with offsets"
        raise InputError(
            f"kernels: expected indices int64 {shape}, got {indices.dtype} {list(indices.shape)}"
        )
    if offsets is not None and (offsets.dtype != torch.int64 or offsets.dim() != 1 or not len(offsets)):
        raise InputError(
            f"kernels: expected offsets int64 [bags + 1], got {offsets.dtype} {list(offsets.shape)}"
        )
    if weights is not None and weights.shape != indices.shape:
        raise InputError(f"kernels: expected weights {list(indices.shape)}, got {list(weights.shape)}")
    return indices.shape[0] if offsets is None else len(offsets) - 1
