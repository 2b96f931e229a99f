"""Casts to FP8 tiles and blocks, alone or joined with what makes the values; on CPU and GPU, the same bits.

    cast_rows             x [m, k]            -> Tiles [m, k]             left operand of Fprop and Dgrad
    cast_columns          x [m, k]            -> Tiles [k, tokens]        operand of Wgrad
    cast_both             x [m, k]            -> both, from one read
    columns_of            Tiles [m, k]        -> Tiles [k, tokens]        Wgrad's operand from the cached FP8
    cast_gated            gate_up [m, 2f]     -> Tiles [m, f]             SwiGLU, never written in BF16
    cast_gated_tiles      Tiles [m, 2f]       -> Tiles [f, tokens]        the same made again for Wgrad
    gated_backward_cast   d_product [m, f]    -> Tiles of both kinds      gradient of gate_up
    cast_normed           x [m, k]            -> RMSNorm's output, and Tiles of it
    cast_weight           w [..., n, k]       -> Blocks [..., n, k]
    cast_weight_both      w [..., n, k]       -> Blocks of it and of its transposed
    decode                Tiles or Blocks     -> values

The law of a tile (rounding, scale, special values) is that of `moe_comm.wire.tile`, whatever the axis: a
column tile is the tile of the transposed values. Blocks follow it with the amax of 128 x 128 values.

Tokens. Where tokens are the summed axis, each group's begin at a multiple of 128 (`Groups`). A gap has the
code 0 always, in a tile of NaN too, and counts for no amax. No tile is all gap, since a group without rows
has no tile.

Retiling. `columns_of(t, g)` is `cast_columns(decode(t), g)` by definition. With power-of-two scales decoding
is exact, the new scale is the smallest power of two that holds the column's amax (never above the largest of
its rows' scales), and a code is shifted by the ratio of two powers of two: it is rounded again only where
the shift carries it into E4M3's subnormals. A row tile of NaN makes all column tiles that it crosses NaN, and
so does one with a value that rounded up to 2^128. Other scales than powers of two are refused.

Exactness. Casts, retiling and decoding give the same bits everywhere. The joined forms compute exp, a
square root or a sum before they cast; these may differ in the last place between a CPU and a GPU, and then
an element that lay next to a tie may differ by one code.
"""

from types import ModuleType

import torch
from moe_comm.wire.tile import ScaleKind, dequantise_tiles
from torch import Tensor

from moe_runtime.errors import NumericsError
from moe_runtime.fp8 import block, cast_cpu, gated_cpu
from moe_runtime.fp8.tiled import Blocks, Groups, Tiles


def _kernels() -> ModuleType:
    from moe_runtime.fp8 import cast_triton

    return cast_triton


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check(fits: bool, expected: str) -> None:
    if not fits:
        raise NumericsError(f"FP8 cast: expected {expected}")


def _check_matrix(x: Tensor, name: str) -> None:
    fits = isinstance(x, Tensor) and x.dim() == 2 and x.dtype in _DTYPES
    found = f"{list(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
    _check(fits, f"{name} of two axes and a floating dtype of 16 to 64 bits, got {found}")


def _check_gated(shape: torch.Size, row_weights: Tensor | None) -> None:
    _check(shape[1] % 2 == 0, f"gate_up of an even width, gate first, got {list(shape)}")
    if row_weights is not None:
        found = list(row_weights.shape)
        _check(found == [shape[0]], f"row_weights [{shape[0]}], one for each row, got {found}")


def _check_weight(weight: Tensor) -> None:
    fits = isinstance(weight, Tensor) and weight.dim() >= 2 and weight.dtype in _DTYPES
    found = f"{list(weight.shape)} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
    _check(fits, f"a weight [..., n, k] of a floating dtype of 16 to 64 bits, got {found}")


def _all_in_one(groups: Groups | None, x: Tensor | Tiles) -> Groups:
    """The groups, or all rows as one."""
    device = x.codes.device if isinstance(x, Tiles) else x.device
    if groups is None:
        return Groups.one(x.shape[0], device)
    if groups.num_rows != x.shape[0]:
        raise NumericsError(f"FP8 cast: expected groups of {x.shape[0]} rows in all, got {groups.num_rows}")
    return groups


@torch.no_grad()
def cast_rows(x: Tensor, scales: ScaleKind = "pow2") -> Tiles:
    """Tiles [m, k] of x [m, k], any floating dtype of 16 to 64 bits. Ref: DSV3 §3.3.2."""
    _check_matrix(x, "x")
    if x.is_cuda:
        tiles: Tiles = _kernels().cast_rows_on_device(x, scales)
        return tiles
    return cast_cpu.quantise_rows(x, scales)


@torch.no_grad()
def cast_columns(x: Tensor, groups: Groups | None = None) -> Tiles:
    """Tiles [k, padded m] of the transposed x [m, k]: 128 tokens of one group to a tile. Ref: DSV3 §3.3.2.

    Raises:
        NumericsError: the groups have another number of rows.
    """
    _check_matrix(x, "x")
    groups = _all_in_one(groups, x)
    if x.is_cuda:
        tiles: Tiles = _kernels().cast_columns_on_device(x, groups)
        return tiles
    return cast_cpu.cast_columns(x, groups)


@torch.no_grad()
def cast_both(x: Tensor, groups: Groups | None = None) -> tuple[Tiles, Tiles]:
    """`cast_rows` and `cast_columns` of x [m, k], from one read."""
    _check_matrix(x, "x")
    groups = _all_in_one(groups, x)
    if x.is_cuda:
        both: tuple[Tiles, Tiles] = _kernels().cast_both_on_device(x, groups)
        return both
    return cast_cpu.cast_both(x, groups)


@torch.no_grad()
def columns_of(tiles: Tiles, groups: Groups | None = None) -> Tiles:
    """Tiles [k, padded m] of the transposed matrix, from Tiles [m, k] with power-of-two scales.

    Raises:
        NumericsError: scales are no powers of two (checked on a CPU; a GPU would have to wait).
    """
    groups = _all_in_one(groups, tiles)
    if tiles.codes.is_cuda:
        made: Tiles = _kernels().columns_of_on_device(tiles, groups)
        return made
    if not cast_cpu.are_powers_of_two(tiles.scales):
        raise NumericsError("FP8 retiling: expected scales that are powers of two; cast with scales='pow2'")
    return cast_cpu.columns_of(tiles, groups)


@torch.no_grad()
def cast_gated(gate_up: Tensor, row_weights: Tensor | None = None) -> Tiles:
    """Tiles [m, f] of silu(gate) x up (x the row's weight), in FP32 until the cast.

    Args:
        gate_up: [m, 2f], gate first.
        row_weights: [m].
    """
    _check_matrix(gate_up, "gate_up")
    _check_gated(gate_up.shape, row_weights)
    if gate_up.is_cuda:
        tiles: Tiles = _kernels().cast_gated_on_device(gate_up, row_weights)
        return tiles
    return gated_cpu.cast_gated(gate_up, row_weights)


@torch.no_grad()
def cast_gated_tiles(
    gate_up: Tiles, row_weights: Tensor | None = None, groups: Groups | None = None
) -> Tiles:
    """Tiles [f, padded m] of silu(gate) x up (x weight), made again from cached Tiles [m, 2f]."""
    _check_gated(gate_up.shape, row_weights)
    groups = _all_in_one(groups, gate_up)
    if gate_up.codes.is_cuda:
        tiles: Tiles = _kernels().cast_gated_tiles_on_device(gate_up, row_weights, groups)
        return tiles
    return gated_cpu.cast_gated_tiles(gate_up, row_weights, groups)


@torch.no_grad()
def gated_backward_cast(
    d_product: Tensor, gate_up: Tiles, row_weights: Tensor | None = None, groups: Groups | None = None
) -> tuple[Tiles, Tiles, Tensor | None]:
    """The gradient of gate_up, cast both ways.

    Args:
        d_product: [m, f], gradient of silu(gate) x up x weight; BF16 or FP32.
        gate_up: Tiles [m, 2f], as cached.
        row_weights: [m].

    Returns:
        (Tiles [m, 2f], Tiles [2f, padded m], gradient of row_weights float32 [m] or None).
    """
    _check_matrix(d_product, "d_product")
    _check_gated(gate_up.shape, row_weights)
    wanted = [gate_up.shape[0], gate_up.shape[1] // 2]
    _check(list(d_product.shape) == wanted, f"d_product {wanted}, got {list(d_product.shape)}")
    groups = _all_in_one(groups, gate_up)
    if d_product.is_cuda:
        made: tuple[Tiles, Tiles, Tensor | None] = _kernels().gated_backward_cast_on_device(
            d_product, gate_up, row_weights, groups
        )
        return made
    return gated_cpu.gated_backward_cast(d_product, gate_up, row_weights, groups)


@torch.no_grad()
def cast_normed(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tiles]:
    """RMSNorm and a cast of its output.

    Args:
        x: [m, k]; gain: [k]; eps: added to the mean square.

    Returns:
        (output [m, k] of the dtype of x, reciprocal root mean square float32 [m], Tiles [m, k]). The tiles
        are those of the output after its rounding: whoever reads FP8 sees what the others see.
    """
    _check_matrix(x, "x")
    _check(list(gain.shape) == [x.shape[1]], f"a gain [{x.shape[1]}], got {list(gain.shape)}")
    if x.is_cuda:
        made: tuple[Tensor, Tensor, Tiles] = _kernels().cast_normed_on_device(x, gain, eps)
        return made
    return cast_cpu.cast_normed(x, gain, eps)


@torch.no_grad()
def cast_weight(weight: Tensor) -> Blocks:
    """Blocks [..., n, k] of weight [..., n, k], scales powers of two. Ref: DSV3 §3.3.2."""
    _check_weight(weight)
    if weight.is_cuda:
        blocks: Blocks = _kernels().cast_weight_on_device(weight)
        return blocks
    return block.cast_weight_on_cpu(weight)


@torch.no_grad()
def cast_weight_both(weight: Tensor) -> tuple[Blocks, Blocks]:
    """Blocks of weight [..., n, k] and of its transposed [..., k, n], from one read: Fprop's and Dgrad's."""
    _check_weight(weight)
    if weight.is_cuda:
        both: tuple[Blocks, Blocks] = _kernels().cast_weight_both_on_device(weight)
        return both
    blocks = block.cast_weight_on_cpu(weight)
    return blocks, blocks.transposed()


@torch.no_grad()
def decode(matrix: Tiles | Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of tiles or blocks; code x scale in FP32, then rounded to dtype (BF16: exact under pow2)."""
    if matrix.codes.is_cuda:
        values: Tensor = _kernels().decode_on_device(matrix, dtype)
        return values
    if isinstance(matrix, Blocks):
        return block.decode_blocks_on_cpu(matrix, dtype)
    return dequantise_tiles(matrix.codes, matrix.scales, dtype)
