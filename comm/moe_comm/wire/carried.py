"""Rows that arrive in E4M3 and stay so: tiles carried by a tensor of activations.

An FP8 GEMM reads codes and scales, which is what the wire brings. Decoding them on arrival, to cast the
result to the same codes again before the GEMM, costs two passes over all rows and twice their memory. But
everything between wire and GEMM (autograd, a pipeline's tape) passes one floating tensor a value. So the
codes and scales travel as an attribute of such a tensor, of which there are two kinds:

    a stand-in      has shape and dtype of the rows and no memory: one NaN, expanded. Made by a dispatcher
                    that keeps tiles. Whoever computes with it by mistake gets NaN, never codes as numbers.
    tokens          real values that were cast while they were made (a norm fused with its cast); a
                    dispatcher sends these tiles instead of casting again.

An attribute belongs to one tensor object: views, copies and detached tensors are others. Whoever makes one
of them on the way says `carry_over`, or `carry_part` for some of the rows. What forgets to loses the
tiles, which is slow for tokens and loud for a stand-in. Values changed in place no longer are what
the tiles say, so reading those is then refused.

Rejected: a subclass of Tensor (each operation of torch in between would have to be taught about it, and
torch.compile and DeepSpeed too); codes in place of the values (an E4M3 code is a number as well, and nothing
would say which of the two it is); the tiles as three more values beside the rows (each seam, and each
dispatcher of others, would grow arguments that nearly always are empty).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moe_comm.errors import InputError
from moe_comm.wire.formats import FP32_MANTISSA_BITS
from moe_comm.wire.tile import NAN_SCALE_BYTE, dequantise_tiles, num_tiles

_ATTRIBUTE = "carried_tiles"
Part = Tensor | slice


class _Carried(NamedTuple):
    """What is hung on a tensor; `version` is the tensor's when it was."""

    codes: Tensor
    scales: Tensor
    is_stand_in: bool
    version: int


def carry(rows: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Hang tiles on the tensor whose values they hold.

    Args:
        rows: [..., hidden], the values before the cast.
        codes: uint8 [n, hidden], one line for each row, in order.
        scales: uint8 [n, tiles], biased exponents as `quantise_tiles` gives them for `pow2`.

    Returns:
        `rows` itself.

    Raises:
        InputError: tiles of another shape or dtype.
    """
    hidden = rows.shape[-1]
    lines = rows.shape[:-1].numel()
    _require("codes", codes, [lines, hidden])
    _require("scales", scales, [lines, num_tiles(hidden)])
    return _hang(rows, codes, scales, False)


def stand_in(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows that exist as tiles alone.

    Args:
        codes: uint8 [n, hidden].
        scales: uint8 [n, tiles].
        dtype: what the rows would be in if they were decoded.

    Returns:
        [n, hidden] of `dtype`, all NaN, one element of memory.

    Raises:
        InputError: tiles of a wrong shape or dtype.
    """
    rows, hidden = codes.shape
    _require("codes", codes, [rows, hidden])
    _require("scales", scales, [rows, num_tiles(hidden)])
    lone = torch.full((1, 1), torch.nan, dtype=dtype, device=codes.device)
    return _hang(lone.expand(rows, hidden), codes, scales, True)


def tiles_of(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """The tiles that a tensor carries: codes uint8 [n, hidden], scales uint8 [n, tiles]; None: it has none.

    Raises:
        InputError: the values were changed in place since.
    """
    found = _found(rows)
    return None if found is None else (found.codes, found.scales)


def decoded(rows: Tensor) -> Tensor:
    """Real values, for what cannot compute with tiles: [n, hidden]; of a tensor that has values, itself."""
    found = _found(rows)
    if found is None or not found.is_stand_in:
        return rows
    return dequantise_tiles(found.codes, found.scales, rows.dtype)


def carry_over(source: Tensor, target: Tensor) -> Tensor:
    """Let `target`, another view of the same values, carry what `source` carries; gives `target`."""
    found = _found(source)
    return target if found is None else _hang(target, found.codes, found.scales, found.is_stand_in)


def carry_part(source: Tensor, target: Tensor, part: Part) -> Tensor:
    """Let `target`, which are the rows `part` of `source` [n, hidden], carry their tiles; gives `target`.

    Args:
        part: slice of rows, or int64 indices of them.
    """
    found = _found(source)
    if found is None:
        return target
    if isinstance(part, slice):
        return _hang(target, found.codes[part], found.scales[part], found.is_stand_in)
    codes, scales = (x.index_select(0, part) for x in (found.codes, found.scales))
    return _hang(target, codes, scales, found.is_stand_in)


def float_scales(scales: Tensor) -> Tensor:
    """Scales as numbers, float32, of biased exponents uint8; byte 255 is NaN."""
    bits = scales.to(torch.int32).bitwise_left_shift_(FP32_MANTISSA_BITS)
    return bits.view(torch.float32).masked_fill_(scales == NAN_SCALE_BYTE, torch.nan)


def byte_scales(scales: Tensor) -> Tensor:
    """Biased exponents, uint8, of scales float32 that are normal powers of two or NaN; at any strides.

    They come with adjacent columns, as fields of records do: a GPU's casts lay numbers out by columns.
    """
    exponents = scales.view(torch.int32).bitwise_right_shift(FP32_MANTISSA_BITS)
    return exponents.to(torch.uint8, memory_format=torch.contiguous_format)


def _hang(rows: Tensor, codes: Tensor, scales: Tensor, is_stand_in: bool) -> Tensor:
    version = -1 if rows.is_inference() else rows._version
    setattr(rows, _ATTRIBUTE, _Carried(codes, scales, is_stand_in, version))
    return rows


def _found(rows: Tensor) -> _Carried | None:
    found: _Carried | None = getattr(rows, _ATTRIBUTE, None)
    if found is not None and found.version >= 0 and found.version != rows._version:
        raise InputError(
            f"tiles: expected values of shape {list(rows.shape)} as they were cast, got values changed in "
            "place since; change a copy"
        )
    return found


def _require(name: str, given: Tensor, shape: list[int]) -> None:
    if list(given.shape) != shape or given.dtype != torch.uint8:
        raise InputError(f"tiles: expected {name} {shape} of uint8, got {list(given.shape)} of {given.dtype}")
