"""The tile quantiser on a GPU: `quantise_tile` for other kernels to fuse, and two kernels of its own.

`quantise_tile` works on values in registers, so a kernel that gathers rows anyway (permute, dispatch)
can round them on the way and write a quarter of the bytes. What a tile means is said in `tile.py`; this
file gives the same bits. Three choices keep it so on every machine:

    amax        is taken of the bits as integers: no question of what a maximum does with NaN
    division    one a tile, 448 / amax by `div_rn` (Triton's `/` is an approximation, 2 units in the last
                place); elements are multiplied by it, and the scale is amax times FP32's 1/448
    rounding    on the bits of the product, as `formats.py` does it. Below the smallest normal, FP32
                adds 2^14: its last place is then one quantum of E4M3, and the sum is rounded to nearest
                even by IEEE's own rule. The sign is taken off with an integer mask in between, so no
                compiler can join product and sum into one operation.

The cast of Triton's interpreter rounds some 2% of the values to the other neighbour, so it is never used.
The cast instruction of sm_89 and newer (`cvt.rn.satfinite.e4m3x2.f32`) replaces a dozen operations;
HARDWARE_CAST=True asks for it, and a test compares its codes with ours where there is a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE: tl.constexpr = tl.constexpr(128)
_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_QUIET_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_FLOOR_BITS: tl.constexpr = tl.constexpr((127 - 100) << 23)  # 2^-100, see tile.py
_MAX: tl.constexpr = tl.constexpr(448.0)
_INVERSE_MAX: tl.constexpr = tl.constexpr(1 / 448)
_NAN_CODE: tl.constexpr = tl.constexpr(0x7F)
_NAN_SCALE_BYTE: tl.constexpr = tl.constexpr(255)
_QUANTUM_SHIFT: tl.constexpr = tl.constexpr(16384.0)  # 2^14: one unit in its last place is 2^-9
_QUANTUM_SHIFT_BITS: tl.constexpr = tl.constexpr((127 + 14) << 23)
_REBIAS: tl.constexpr = tl.constexpr((127 - 7) << 3)
_ROWS_PER_PROGRAM = 32


@triton.jit
def quantise_tile(values: tl.tensor, POW2: tl.constexpr, HARDWARE_CAST: tl.constexpr = False) -> Any:
    """Quantise one tile, or a block of tiles, that is already in registers.

    Args:
        values: float32 [128] or [ROWS, 128] (any power of two instead of 128 works as well); pad a
            tail tile with zeros.
        POW2: the scale is a power of two.
        HARDWARE_CAST: round with the cast instruction (compiled for sm_89 or newer only).

    Returns:
        (codes uint8 as `values`, scale [] or [ROWS]: float32, or with POW2 uint8, the biased exponent).

    Ref: DSV3 §3.3.2
    """
    axis: tl.constexpr = len(values.shape) - 1
    magnitude = values.to(tl.int32, bitcast=True) & _MAGNITUDE
    amax_bits = tl.max(magnitude, axis=axis)
    is_finite = amax_bits < _INFINITY
    amax_bits = tl.maximum(amax_bits, _FLOOR_BITS)
    if POW2:
        exponent = ((amax_bits + 0x1FFFFF) >> 23) - 8
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        scale = tl.where(is_finite, exponent, _NAN_SCALE_BYTE).to(tl.uint8)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True)
        inverse = tl.div_rn(tl.full(amax.shape, _MAX, tl.float32), amax)
        scale_bits = (amax * _INVERSE_MAX).to(tl.int32, bitcast=True)
        scale = tl.where(is_finite, scale_bits, _QUIET_NAN).to(tl.float32, bitcast=True)
    scaled = values * tl.expand_dims(inverse, axis)
    if HARDWARE_CAST:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = round_e4m3(scaled)
    return tl.where(tl.expand_dims(is_finite, axis), codes, _NAN_CODE).to(tl.uint8), scale


@triton.jit
def round_e4m3(values: tl.tensor) -> Any:
    """E4M3 codes, uint8, of finite float32 values of magnitude below 464; nearest, ties to even."""
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    is_odd = (magnitude >> 20) & 1
    normal = ((magnitude + 0x7FFFF + is_odd) >> 20) - _REBIAS
    small = magnitude.to(tl.float32, bitcast=True) + _QUANTUM_SHIFT
    fixed = small.to(tl.int32, bitcast=True) - _QUANTUM_SHIFT_BITS
    # The format's normals begin at magnitude bits (127 - 6) << 23; each way is right on its own side.
    code = tl.where(magnitude < ((127 - 6) << 23), fixed, normal)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def dequantise_tile(codes: tl.tensor, scale: tl.tensor, POW2: tl.constexpr) -> Any:
    """Values of a tile or a block of tiles, the inverse of `quantise_tile`.

    Args:
        codes: uint8 [128] or [ROWS, 128].
        scale: [] or [ROWS], as `quantise_tile` gives it.
        POW2: scale is the biased exponent of a power of two.

    Returns:
        float32 as `codes`.
    """
    axis: tl.constexpr = len(codes.shape) - 1
    if POW2:
        exponent = scale.to(tl.int32)
        bits = tl.where(exponent == _NAN_SCALE_BYTE, _QUIET_NAN, exponent << 23)
        factor = bits.to(tl.float32, bitcast=True)
    else:
        factor = scale
    code = codes.to(tl.int32)
    magnitude = code & 0x7F
    # A subnormal is counted in quanta of 2^-9; its bits alone would be a subnormal of FP32.
    small = (magnitude.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(magnitude < 8, small, (magnitude + _REBIAS) << 20) | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * tl.expand_dims(factor, axis)


@triton.jit
def quantise_kernel(
    values: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_rows: int,
    num_columns: int,
    num_tiles: int,
    row_stride: int,
    POW2: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Quantise [num_rows, num_columns]; a program takes one tile column of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    is_inside = (row < num_rows)[:, None] & (column < num_columns)[None, :]
    block = tl.load(values + row[:, None] * row_stride + column[None, :], mask=is_inside, other=0.0)
    block_codes, block_scales = quantise_tile(block.to(tl.float32), POW2, HARDWARE_CAST)
    tl.store(codes + row[:, None] * num_columns + column[None, :], block_codes, mask=is_inside)
    tl.store(scales + row * num_tiles + tile, block_scales, mask=row < num_rows)


@triton.jit
def dequantise_kernel(
    codes: tl.tensor,
    scales: tl.tensor,
    values: tl.tensor,
    num_rows: int,
    num_columns: int,
    code_stride: int,
    scale_stride: int,
    POW2: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Values [num_rows, num_columns] of strided codes and scales; programs as in `quantise_kernel`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    is_row = row < num_rows
    is_inside = is_row[:, None] & (column < num_columns)[None, :]
    block_codes = tl.load(codes + row[:, None] * code_stride + column[None, :], mask=is_inside, other=0)
    block_scales = tl.load(scales + row * scale_stride + tile, mask=is_row, other=0)
    block = dequantise_tile(block_codes, block_scales, POW2)
    place = values + row[:, None] * num_columns + column[None, :]
    tl.store(place, block.to(values.dtype.element_ty), mask=is_inside)


def quantise_on_device(values: Tensor, pow2: bool, hardware_cast: bool = False) -> tuple[Tensor, Tensor]:
    """`quantise_tiles` of a tensor on a CUDA device, or anywhere under TRITON_INTERPRET=1.

    Args:
        values: [rows, columns] of float32, bfloat16 or float16, columns adjacent in memory.
        pow2: the scale is a power of two, kept as its biased exponent.
        hardware_cast: see `quantise_tile`.

    Returns:
        (codes uint8 [rows, columns], scales [rows, tiles]).
    """
    rows, columns = values.shape
    tiles = triton.cdiv(columns, TILE.value)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=values.device)
    scale_dtype = torch.uint8 if pow2 else torch.float32
    scales = torch.empty((rows, tiles), dtype=scale_dtype, device=values.device)
    if codes.numel():
        quantise_kernel[triton.cdiv(rows, _ROWS_PER_PROGRAM), tiles](
            values,
            codes,
            scales,
            rows,
            columns,
            tiles,
            values.stride(0),
            POW2=pow2,
            HARDWARE_CAST=hardware_cast,
            ROWS=_ROWS_PER_PROGRAM,
        )
    return codes, scales


def dequantise_on_device(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`dequantise_tiles` on a CUDA device, or anywhere under TRITON_INTERPRET=1.

    Args:
        codes: uint8 [rows, columns], columns adjacent in memory, rows at any distance.
        scales: float32 or uint8 [rows, tiles], likewise.
        dtype: float32, bfloat16 or float16; rounded once from float32.

    Returns:
        [rows, columns] of dtype.
    """
    rows, columns = codes.shape
    values = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if values.numel():
        dequantise_kernel[triton.cdiv(rows, _ROWS_PER_PROGRAM), scales.shape[1]](
            codes,
            scales,
            values,
            rows,
            columns,
            codes.stride(0),
            scales.stride(0),
            POW2=scales.dtype == torch.uint8,
            ROWS=_ROWS_PER_PROGRAM,
        )
    return values
