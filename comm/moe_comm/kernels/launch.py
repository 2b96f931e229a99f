"""Shapes of work that all row kernels share, and what their arguments promise about alignment.

A row kernel is a copy with a few additions on the way: its time is the time of its bytes. Hopper's
memory is fast only if enough bytes are under way at once, some 40 KiB a multiprocessor (4.8 TB/s times
a loaded latency of 1 us, over 132 of them), in requests of whole 128-byte lines. Hence

    a program   4 warps on 2 KiB of a row: 16 bytes a thread, one wide instruction; several rows at a
                time where it reads more than it writes, so that 8 KiB are under way
    a row       hidden 7168 in BF16 is 7 such pieces exactly; neighbouring programs take the pieces of
                one row, so a row is written front to back within a short time
    the grid    tens of thousands of programs at full size: no tail worth speaking of

Triton widens an access only as far as it can prove alignment. Rows inside records lie at any multiple
of the record's alignment, which it cannot see from a row stride; `vector_bytes` measures it and the
kernels state it. Records of a multiple of 16 bytes get full width; at 4 bytes a warp still fills whole
lines with four times the instructions.

Rejected: one program a row with all of 7168 in registers (a power of two is needed, so an eighth of
the lanes would idle, and few tokens would leave multiprocessors without work); bulk copies through
shared memory (one more trip, nothing is reused).
"""

import math

import torch
from torch import Tensor

from moe_comm.errors import InputError

NUM_WARPS = 4
_PIECE_BYTES = NUM_WARPS * 32 * 16


def piece_columns(columns: int, itemsize: int) -> int:
    """Columns of a row that one program takes: a power of two, at most 2 KiB.

    Args:
        columns: width of the row.
        itemsize: bytes of one element.
    """
    return min(1 << (columns - 1).bit_length(), _PIECE_BYTES // itemsize)


def vector_bytes(rows: Tensor) -> int:
    """The largest power of two, up to 16, at a multiple of which every row begins.

    Args:
        rows: [rows, columns], rows at any distance.
    """
    return math.gcd(rows.data_ptr(), rows.stride(0) * rows.element_size(), 16)


def check_rows(
    rows: Tensor, name: str, *, columns: int | None = None, dtype: torch.dtype | None = None
) -> None:
    """Refuse what a row kernel cannot address.

    Args:
        rows: expected [rows, columns] with adjacent columns; rows may be apart.
        name: the argument's name, for the message.
        columns: expected width, if it is known.
        dtype: expected dtype, if it is known.

    Raises:
        InputError: another number of axes, width, dtype, or columns apart in memory.
    """
    if rows.dim() != 2 or (columns is not None and rows.shape[1] != columns):
        width = "columns" if columns is None else str(columns)
        raise InputError(f"kernels: expected {name} [rows, {width}], got shape {list(rows.shape)}")
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        raise InputError(
            f"kernels: expected {name} with adjacent columns, got strides {list(rows.stride())}; "
            "call .contiguous()"
        )
    if dtype is not None and rows.dtype != dtype:
        raise InputError(f"kernels: expected {name} of {dtype}, got {rows.dtype}")
