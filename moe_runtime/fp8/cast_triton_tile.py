"""Casts on a GPU: what their kernels share.

A cast is a copy with arithmetic on the way. What it has to move, in bytes an element of BF16 (scales,
4 bytes for each 128 codes, add 0.03):

    cast_rows, cast_columns     2 + 1              cast_gated          2 x 2 + 1
    cast_both                   2 + 2 x 1          cast_gated_tiles    2 x 1 + 1
    columns_of                  1 + 1              gated_backward      2 + 2 x 1 + 4 x 1
    cast_weight_both            2 + 2 x 1          cast_normed         2 + 2 + 1

At 4 TB/s a card of 132 multiprocessors must finish some 5 elements a clock in each, so a handful of
instructions an element is all there is. Rounding on the bits (`round_e4m3`) takes over a dozen; the cast
instruction half of one. HARDWARE_CAST=True uses it, and the other conversion instructions; it is the rule
where the device has them (sm_89 and newer), and the tests hold its codes against those of the integer
form, which is what the interpreter runs and what older cards get.

How columns come to lie side by side. Transposing single bytes through shared memory would be slow. A
program reads its 128 tokens as four quarters, rows 0 4 8 .. and 1 5 9 .. and so on; so the four codes
that will be neighbours lie in four registers of one thread, are joined to a word, and words are transposed:

    rows     4i + 0 | c0                word i of column n
             4i + 1 |    c1       ->    c0 + c1 << 8 + c2 << 16 + c3 << 24          [32, n] -> [n, 32]
             4i + 2 |       c2
             4i + 3 |          c3       a column's 128 codes are then one line of 128 bytes

Scales lie as [tiles, rows rounded up to 4], the order in which matrix units read them, so a program writes
a run of them. A tile with anything not finite has the inverse NaN: its codes become NaN by themselves.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from moe_comm.kernels.unpermute import narrow
from moe_comm.wire.tile_triton import dequantise_tile, round_e4m3
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Tiles, num_tiles

_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_QUIET_NAN: tl.constexpr = tl.constexpr(0x7FC00000)
_FLOOR_BITS: tl.constexpr = tl.constexpr((127 - 100) << 23)
_MAX: tl.constexpr = tl.constexpr(448.0)
_INVERSE_MAX: tl.constexpr = tl.constexpr(1 / 448)
_NAN_CODE: tl.constexpr = tl.constexpr(0x7F)
_TILE: tl.constexpr = tl.constexpr(TILE)


@triton.jit
def _larger(left: tl.tensor, right: tl.tensor) -> Any:
    return tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def magnitude_of(values: tl.tensor, HARDWARE_CAST: tl.constexpr) -> Any:
    """What `larger_of` and `amax_bits` compare: |x| in float32, or its bits as int32."""
    if HARDWARE_CAST:
        result = tl.abs(values)
    else:
        result = values.to(tl.int32, bitcast=True) & _MAGNITUDE
    return result


@triton.jit
def larger_of(left: tl.tensor, right: tl.tensor, HARDWARE_CAST: tl.constexpr) -> Any:
    """The larger magnitude of two; NaN counts as the largest."""
    if HARDWARE_CAST:
        result = _larger(left, right)
    else:
        result = tl.maximum(left, right)
    return result


@triton.jit
def amax_bits(magnitudes: tl.tensor, AXIS: tl.constexpr, HARDWARE_CAST: tl.constexpr) -> Any:
    """int32 bits of the largest magnitude along AXIS; at least those of infinity where one is not finite."""
    if HARDWARE_CAST:
        result = tl.reduce(magnitudes, AXIS, _larger).to(tl.int32, bitcast=True)
    else:
        result = tl.max(magnitudes, axis=AXIS)
    return result


@triton.jit
def scales_of(bits: tl.tensor, POW2: tl.constexpr) -> Any:
    """(inverse, scale), float32, of the bits of amax; both NaN where a tile is not finite."""
    is_finite = bits < _INFINITY
    floored = tl.maximum(bits, _FLOOR_BITS)
    if POW2:
        exponent = ((floored + 0x1FFFFF) >> 23) - 8
        inverse_bits = (254 - exponent) << 23
        scale_bits = exponent << 23
    else:
        amax = floored.to(tl.float32, bitcast=True)
        inverse_bits = tl.div_rn(tl.full(amax.shape, _MAX, tl.float32), amax).to(tl.int32, bitcast=True)
        scale_bits = (amax * _INVERSE_MAX).to(tl.int32, bitcast=True)
    inverse = tl.where(is_finite, inverse_bits, _QUIET_NAN).to(tl.float32, bitcast=True)
    return inverse, tl.where(is_finite, scale_bits, _QUIET_NAN).to(tl.float32, bitcast=True)


@triton.jit
def encode(scaled: tl.tensor, HARDWARE_CAST: tl.constexpr) -> Any:
    """E4M3 codes, uint8, of float32 values of magnitude below 464; NaN becomes 0x7F."""
    if HARDWARE_CAST:
        codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        codes = tl.where(scaled == scaled, round_e4m3(scaled), _NAN_CODE).to(tl.uint8)
    return codes


@triton.jit
def values_of(codes: tl.tensor, scales: tl.tensor, HARDWARE_CAST: tl.constexpr) -> Any:
    """float32 values of codes uint8 [.., 128] and their scales [..]."""
    if HARDWARE_CAST:
        unscaled = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        values = unscaled * tl.expand_dims(scales, len(codes.shape) - 1)
    else:
        values = dequantise_tile(codes, scales, False)
    return values


@triton.jit
def rounded(values: tl.tensor, DTYPE: tl.constexpr, HARDWARE_CAST: tl.constexpr) -> Any:
    """float32 values in DTYPE, to nearest even; the interpreter's own cast would cut BF16 off."""
    if HARDWARE_CAST:
        result = values.to(DTYPE)
    else:
        result = narrow(values, DTYPE)
    return result


@triton.jit
def word_mask(count: tl.tensor) -> Any:
    """int32 [32]: the bytes of each word that stand for rows below `count`; a gap has the code 0 always."""
    left = tl.minimum(tl.maximum(count - 4 * tl.arange(0, 32), 0), 4)
    # Four bytes in two steps, for a shift by 32 is none at all.
    low = tl.minimum(left, 2) * 8
    high = tl.maximum(left - 2, 0) * 8
    return ((1 << low) - 1) | (((1 << high) - 1) << 16)


@triton.jit
def joined(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor) -> Any:
    """Four codes in one int32, the first in the lowest byte."""
    low = c0.to(tl.int32) | (c1.to(tl.int32) << 8)
    return low | (c2.to(tl.int32) << 16) | (c3.to(tl.int32) << 24)


@triton.jit
def encode_joined(
    v0: tl.tensor, v1: tl.tensor, v2: tl.tensor, v3: tl.tensor, HARDWARE_CAST: tl.constexpr
) -> Any:
    """The codes of four values in one int32, the first in the lowest byte.

    The cast instruction takes two values. Triton would give it neighbours along the last axis and then
    take the pairs apart; here they are those that stay together.
    """
    if HARDWARE_CAST:
        result = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            mov.b32 $0, {low, high};
            }""",
            "=r,f,f,f,f",
            [v0, v1, v2, v3],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        result = joined(encode(v0, False), encode(v1, False), encode(v2, False), encode(v3, False))
    return result


@triton.jit
def sigmoid(values: tl.tensor, HARDWARE_CAST: tl.constexpr) -> Any:
    """1 / (1 + exp(-x)) of float32; four instructions, good to some 2^-20, if there is hardware."""
    if HARDWARE_CAST:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [values * -1.4426950408889634],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1.0 + power], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / (1.0 + tl.exp(-values))
    return result


def launch_options(num_warps: int, max_registers: int | None) -> dict[str, int]:
    """What a kernel's launch takes beside its arguments; max_registers: of a thread, None: the compiler's."""
    return {"num_warps": num_warps} | ({} if max_registers is None else {"maxnreg": max_registers})


def casts_in_hardware(device: torch.device, wanted: bool | None) -> bool:
    """What a kernel is launched with: as wanted; None: where the device has the instructions."""
    return _has_cast_instruction(device) if wanted is None else wanted


@cache
def _has_cast_instruction(device: torch.device) -> bool:
    """Whether the device has the conversion instructions of sm_89; a CPU (the interpreter) has none."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def empty_tiles(rows: int, columns: int, device: torch.device) -> Tiles:
    """Room for tiles, scales in the order of the matrix units; `scales.stride(1)` is their distance."""
    storage = torch.empty((num_tiles(columns), -(-rows // 4) * 4), dtype=torch.float32, device=device)
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=device)
    return Tiles(codes, storage[:, :rows].transpose(0, 1))


def readable(matrix: Tensor) -> Tensor:
    """A floating matrix that the kernels can read: no FP64, columns side by side."""
    matrix = matrix.float() if matrix.dtype == torch.float64 else matrix
    return matrix if matrix.shape[-1] < 2 or matrix.stride(-1) == 1 else matrix.contiguous()
