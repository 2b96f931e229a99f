"""Rows into sending order: a token is read once and written to each of its rows.

Bytes, at 8,192 tokens x 7,168 in BF16, top-8 (65,536 rows):

                                             read      written    together
    gather, one program a row                0.94 GB   0.94 GB    1.88 GB
    `permute_tokens`, one program a token    0.12 GB   0.94 GB    1.06 GB
    `permute_quantise`, to E4M3 and scales   0.12 GB   0.48 GB    0.60 GB

The rows of one token lie far apart in sending order, and 0.12 GB of tokens do not fit into 50 MB of L2:
a gather fetches a token from memory for nearly each of its rows. So the loop runs over tokens, whose
values stay in registers while they are written to up to top_k rows; which rows is `slot_rows`, the
inverse of the order that a gather would use. Rows are distinct, so no two programs write one place and
the result does not depend on timing. Quantising on the way costs no byte and happens once a token, not
once a row: at some 25 integer operations a value, doing it per row would be slower than the memory.

Rows may lie inside records (a row stride, see `moe_comm.record`), so packing is no pass of its own.
What is written is not read again by these kernels: it is stored as streaming data (`.cs`), to leave L2
to the tokens.

`gather_rows` is for what is read once only: reordering received rows by expert, and the narrow columns
(gate weights, ids) beside the rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_comm.errors import InputError
from moe_comm.kernels.launch import NUM_WARPS, check_rows, piece_columns, vector_bytes
from moe_comm.wire.tile_triton import TILE, quantise_tile

ROWS_AT_ONCE = 4
TILES_AT_ONCE = 8
QUANTISE_WARPS = 2  # then a thread has 16 codes, and one store writes them; with four it would have 8


@triton.jit
def permute_kernel(
    tokens: tl.tensor,
    slot_rows: tl.tensor,
    rows: tl.tensor,
    token_stride: int,
    row_stride: int,
    TOP_K: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    READ_ALIGN: tl.constexpr,
    WRITE_ALIGN: tl.constexpr,
) -> None:
    """One piece of one token, to each of its rows."""
    pieces: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < COLUMNS
    source = tl.multiple_of(tokens + token * token_stride + column, READ_ALIGN)
    values = tl.load(source, mask=is_column)
    for choice in tl.static_range(TOP_K):
        row = tl.load(slot_rows + token * TOP_K + choice)
        target = tl.multiple_of(rows + row * row_stride + column, WRITE_ALIGN)
        tl.store(target, values, mask=is_column & (row >= 0), cache_modifier=".cs")


@triton.jit
def permute_quantise_kernel(
    tokens: tl.tensor,
    slot_rows: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    token_stride: int,
    code_stride: int,
    scale_stride: int,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILES: tl.constexpr,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    READ_ALIGN: tl.constexpr,
    WRITE_ALIGN: tl.constexpr,
) -> None:
    """TILES tiles of one token, quantised once, to each of its rows."""
    num_tiles: tl.constexpr = (COLUMNS + TILE - 1) // TILE
    pieces: tl.constexpr = (num_tiles + TILES - 1) // TILES
    token = (tl.program_id(0) // pieces).to(tl.int64)
    tile = (tl.program_id(0) % pieces) * TILES + tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    is_column = column < COLUMNS
    source = tl.multiple_of(tokens + token * token_stride + column, [1, READ_ALIGN])
    values = tl.load(source, mask=is_column, other=0.0).to(tl.float32)
    piece_codes, piece_scales = quantise_tile(values, POW2, HARDWARE_CAST)
    # The scales of all rows in one store: eight narrow ones would each wait for an exchange of registers.
    choices = tl.arange(0, CHOICES)
    all_rows = tl.load(slot_rows + token * TOP_K + choices, mask=choices < TOP_K, other=-1)
    scale_places = scales + all_rows[:, None] * scale_stride + tile[None, :]
    is_scale = (all_rows >= 0)[:, None] & (tile < num_tiles)[None, :]
    tl.store(scale_places, tl.broadcast_to(piece_scales[None, :], (CHOICES, TILES)), mask=is_scale)
    for choice in tl.static_range(TOP_K):
        row = tl.load(slot_rows + token * TOP_K + choice)
        target = tl.multiple_of(codes + row * code_stride + column, [1, WRITE_ALIGN])
        tl.store(target, piece_codes, mask=is_column & (row >= 0), cache_modifier=".cs")


@triton.jit
def gather_kernel(
    source: tl.tensor,
    index: tl.tensor,
    target: tl.tensor,
    num_rows: int,
    source_stride: int,
    target_stride: int,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    READ_ALIGN: tl.constexpr,
    WRITE_ALIGN: tl.constexpr,
) -> None:
    """One piece of ROWS rows; a negative index gives zeros."""
    pieces: tl.constexpr = (COLUMNS + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // pieces).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    is_place = (row < num_rows)[:, None] & (column < COLUMNS)[None, :]
    origin = tl.load(index + row, mask=row < num_rows, other=-1)
    read = tl.multiple_of(source + origin[:, None] * source_stride + column[None, :], [1, READ_ALIGN])
    values = tl.load(read, mask=is_place & (origin >= 0)[:, None], other=0)
    write = tl.multiple_of(target + row[:, None] * target_stride + column[None, :], [1, WRITE_ALIGN])
    tl.store(write, values, mask=is_place, cache_modifier=".cs")


def permute_tokens(tokens: Tensor, slot_rows: Tensor, rows: Tensor) -> Tensor:
    """Write each token to its rows: rows[slot_rows[t, k]] = tokens[t].

    It is dispatch's gather, `tokens.index_select(0, row_tokens)`, and with gradients of tokens that of
    combine's backward.

    Args:
        tokens: [tokens, hidden], rows at any distance.
        slot_rows: int64 [tokens, top_k] row of each slot, each row at most once; -1 for none.
        rows: [rows, hidden] of the dtype of tokens, written in place; rows may be at any distance.
            Rows that no slot names are left as they are.

    Returns:
        rows.

    Raises:
        InputError: tensors that do not fit together.
    """
    check_rows(tokens, "tokens")
    check_rows(rows, "rows", columns=tokens.shape[1], dtype=tokens.dtype)
    _check_slot_rows(slot_rows, tokens.shape[0])
    columns = tokens.shape[1]
    block = piece_columns(columns, tokens.element_size())
    if slot_rows.numel() and columns:
        permute_kernel[(tokens.shape[0] * triton.cdiv(columns, block),)](
            tokens,
            slot_rows.contiguous(),
            rows,
            tokens.stride(0),
            rows.stride(0),
            TOP_K=slot_rows.shape[1],
            COLUMNS=columns,
            BLOCK=block,
            READ_ALIGN=vector_bytes(tokens),
            WRITE_ALIGN=vector_bytes(rows),
            num_warps=NUM_WARPS,
        )
    return rows


def permute_quantise(
    tokens: Tensor,
    slot_rows: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    hardware_cast: bool = False,
    num_warps: int = QUANTISE_WARPS,
) -> None:
    """Quantise each token to E4M3 in tiles of 1x128 and write it to its rows.

    The same codes and scales as the wire codec's `encode` followed by a gather, bit for bit.

    Args:
        tokens: [tokens, hidden] of bfloat16, float16 or float32, rows at any distance.
        slot_rows: int64 [tokens, top_k] row of each slot, each row at most once; -1 for none.
        codes: uint8 [rows, hidden], written in place; rows may be at any distance.
        scales: [rows, ceil(hidden / 128)], written in place, likewise; float32, or uint8 for a power of
            two kept as its biased exponent.
        hardware_cast: round with the cast instruction of sm_89 and newer.
        num_warps: of a program.

    Raises:
        InputError: tensors that do not fit together.

    Ref: DSV3 §3.3.2, §3.3.3
    """
    columns = tokens.shape[-1]
    check_rows(tokens, "tokens")
    check_rows(codes, "codes", columns=columns, dtype=torch.uint8)
    check_rows(scales, "scales", columns=triton.cdiv(columns, TILE.value))
    _check_slot_rows(slot_rows, tokens.shape[0])
    if scales.dtype not in (torch.float32, torch.uint8):
        raise InputError(f"kernels: expected scales of float32 or uint8, got {scales.dtype}")
    if slot_rows.numel() and columns:
        pieces = triton.cdiv(scales.shape[1], TILES_AT_ONCE)
        permute_quantise_kernel[(tokens.shape[0] * pieces,)](
            tokens,
            slot_rows.contiguous(),
            codes,
            scales,
            tokens.stride(0),
            codes.stride(0),
            scales.stride(0),
            TOP_K=slot_rows.shape[1],
            CHOICES=triton.next_power_of_2(slot_rows.shape[1]),
            COLUMNS=columns,
            TILES=TILES_AT_ONCE,
            POW2=scales.dtype == torch.uint8,
            HARDWARE_CAST=hardware_cast,
            READ_ALIGN=vector_bytes(tokens),
            WRITE_ALIGN=vector_bytes(codes),
            num_warps=num_warps,
        )


def gather_rows(source: Tensor, index: Tensor, target: Tensor | None = None) -> Tensor:
    """target[i] = source[index[i]], zeros where the index is negative.

    Args:
        source: [n, columns] of any dtype, rows at any distance.
        index: int64 [rows] in 0..n-1, or negative.
        target: [rows, columns] of the dtype of source, written in place, rows at any distance; a new
            contiguous one if None.

    Returns:
        target.

    Raises:
        InputError: tensors that do not fit together.
    """
    columns = source.shape[-1]
    if target is None:
        target = source.new_empty((index.numel(), columns))
    check_rows(source, "source")
    check_rows(target, "target", columns=columns, dtype=source.dtype)
    if index.dtype != torch.int64 or index.shape != target.shape[:1]:
        raise InputError(
            f"kernels: expected index int64 [{target.shape[0]}], got {index.dtype} {list(index.shape)}"
        )
    if target.numel():
        rows, block = gather_tile(columns, source.element_size())
        gather_kernel[(triton.cdiv(target.shape[0], rows) * triton.cdiv(columns, block),)](
            source,
            index.contiguous(),
            target,
            target.shape[0],
            source.stride(0),
            target.stride(0),
            COLUMNS=columns,
            ROWS=rows,
            BLOCK=block,
            READ_ALIGN=vector_bytes(source),
            WRITE_ALIGN=vector_bytes(target),
            num_warps=NUM_WARPS,
        )
    return target


def gather_tile(columns: int, itemsize: int) -> tuple[int, int]:
    """(rows, columns) that a program of `gather_rows` takes: 8 KiB, few wide rows or many narrow ones."""
    block = piece_columns(columns, itemsize)
    return min(1024, ROWS_AT_ONCE * piece_columns(1 << 30, itemsize) // block), block


def _check_slot_rows(slot_rows: Tensor, num_tokens: int) -> None:
    if slot_rows.dtype != torch.int64 or slot_rows.dim() != 2 or slot_rows.shape[0] != num_tokens:
        raise InputError(
            f"kernels: expected slot_rows int64 [{num_tokens}, top_k], got {slot_rows.dtype} "
            f"{list(slot_rows.shape)}"
        )
