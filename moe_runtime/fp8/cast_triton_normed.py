"""RMSNorm joined with the cast of its output, on a GPU: x is read once.

A program holds whole rows, [tiles, 128] of each, for the mean square needs all of it before anything can be
written. The output is rounded to the dtype of x first and the tiles are those of the rounded values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.cast_triton_tile import (
    amax_bits,
    casts_in_hardware,
    empty_tiles,
    encode,
    launch_options,
    magnitude_of,
    readable,
    rounded,
    scales_of,
)
from moe_runtime.fp8.tiled import TILE, Tiles, num_tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
WARPS = 8


@triton.jit
def cast_normed_kernel(
    values: tl.tensor,
    gain: tl.tensor,
    out: tl.tensor,
    rstd: tl.tensor,
    codes: tl.tensor,
    scales: tl.tensor,
    num_columns: int,
    row_stride: int,
    scale_stride: int,
    eps: float,
    HARDWARE_CAST: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """One row; TILES is a power of two that holds all of its tiles."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, TILES)
    column = tile[:, None] * _TILE + tl.arange(0, _TILE)[None, :]
    is_inside = column < num_columns
    high = tl.load(values + row * row_stride + column, mask=is_inside, other=0.0).to(tl.float32)
    # Before the mean square is known: the wait for it covers that for the gain.
    gains = tl.load(gain + column, mask=is_inside, other=0.0).to(tl.float32)
    total = tl.sum(tl.sum(high * high, axis=1), axis=0)
    factor = tl.rsqrt(total / num_columns + eps)
    tl.store(rstd + row, factor)
    narrowed = rounded(high * factor * gains, out.dtype.element_ty, HARDWARE_CAST)
    tl.store(out + row * num_columns + column, narrowed, mask=is_inside)
    seen = narrowed.to(tl.float32)
    inverse, scale = scales_of(amax_bits(magnitude_of(seen, HARDWARE_CAST), 1, HARDWARE_CAST), True)
    made = encode(seen * inverse[:, None], HARDWARE_CAST)
    tl.store(codes + row * num_columns + column, made, mask=is_inside)
    tl.store(scales + tile.to(tl.int64) * scale_stride + row, scale, mask=tile * _TILE < num_columns)


def cast_normed_on_device(
    x: Tensor,
    gain: Tensor,
    eps: float,
    *,
    hardware_cast: bool | None = None,
    num_warps: int = WARPS,
    max_registers: int | None = None,
) -> tuple[Tensor, Tensor, Tiles]:
    """RMSNorm of rows and a cast of its output.

    Args:
        x: [m, k] floating.
        gain: [k] floating.
        eps: added to the mean square.
        hardware_cast: use the conversion instructions; None: where the device has them.
        num_warps: of a program, which takes one row.
        max_registers: of a thread; None: as the compiler likes.

    Returns:
        (output [m, k] of the dtype of x, 1 / root mean square float32 [m], Tiles [m, k] of the output).
    """
    x = readable(x)
    rows, columns = x.shape
    out = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    made = empty_tiles(rows, columns, x.device)
    if x.numel():
        cast_normed_kernel[(rows,)](
            x,
            gain.contiguous(),
            out,
            rstd,
            made.codes,
            made.scales,
            columns,
            x.stride(0),
            made.scales.stride(1),
            eps,
            HARDWARE_CAST=casts_in_hardware(x.device, hardware_cast),
            TILES=triton.next_power_of_2(num_tiles(columns)),
            **launch_options(num_warps, max_registers),
        )
    return out, rstd, made
