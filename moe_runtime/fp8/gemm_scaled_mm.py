"""The back end `scaled_mm`: torch's scaled product, which is cuBLASLt's block scaling on Hopper.

    right         recipe                scales of left       scales of right
    Blocks        1x128 by 128x128      [m, tiles], (1, m)   [tiles rounded up to 4, n / 128], (1, that)
    Tiles         1x128 by 1x128        [m, tiles], (1, m)   [n, tiles], (1, n)                 size, strides

Strides must be exactly these, so scales are copied where a matrix has rows no multiple of 4 or is a slice of
one; that is 1/32 of the bytes of the codes. Rows are filled up to a multiple of 4, columns to one of 16
and the depth to whole tiles, where they are none: then codes are copied too.

The library has no form for groups on Hopper: groups are a loop of products, each written in its place. It
cannot add to what is there either, so adding takes a second pass.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_runtime.fp8.gemm_per_group import add_each, multiply_each
from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles

_TILES_RECIPE = 4  # torch.nn.functional.ScalingType.BlockWise1x128
_BLOCKS_RECIPE = 5  # torch.nn.functional.ScalingType.BlockWise128x128
_ROWS = 4  # cuBLASLt: rows of scales that begin at multiples of 16 bytes
_BYTES = 16  # and rows of codes


@cache
def why_not(device: torch.device) -> str | None:
    """Why this back end cannot run on a device; None if it can."""
    if device.type != "cuda":
        return f"a CUDA device, got {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"a Hopper GPU, got {torch.cuda.get_device_name(device)}"
    if not hasattr(torch, "_scaled_mm_v2"):
        return f"torch with _scaled_mm_v2, got {torch.__version__}"
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if cuda < (12, 9):
        return f"torch built with CUDA 12.9 or newer, got {torch.version.cuda}"
    return None


def multiply_into(out: Tensor, left: Tiles, right: Blocks | Tiles, accumulate: bool) -> None:
    """Write or add left [m, k] times right [n, k] into out [m, n]."""
    rows, columns = out.shape
    if not out.numel():
        return
    if not left.shape[1]:
        if not accumulate:
            out.zero_()
        return
    fits = rows % _ROWS == 0 and columns % _BYTES == 0 and out.stride(0) == columns
    target = out if fits and not accumulate else _room(out)
    left_scales = _tile_scales(left.scales, target.shape[0])
    if isinstance(right, Blocks):
        right_scales, recipe = _block_scales(right.scales), _BLOCKS_RECIPE
    else:
        right_scales, recipe = _tile_scales(right.scales, target.shape[1]), _TILES_RECIPE
    torch.ops.aten._scaled_mm_v2.out(
        _codes(left.codes, target.shape[0]),
        _codes(right.codes, target.shape[1]).t(),
        [left_scales],
        [_TILES_RECIPE],
        [],
        [right_scales],
        [recipe],
        [],
        None,
        out.dtype,
        out=target,
    )
    if target is not out:
        made = target[:rows, :columns]
        if accumulate:
            out.add_(made)
        else:
            out.copy_(made)


def multiply_groups_into(out: Tensor, left: Tiles, right: Blocks, groups: Groups) -> None:
    """Write rows of each group times its matrix into out [m, n]; left [m, k], right [g, n, k]."""
    multiply_each(multiply_into, out, left, right, groups)


def weight_grad_groups(out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool) -> None:
    """Write or add the sums over each group's tokens into out [g, n, k]; left [n, t], right [k, t]."""
    add_each(multiply_into, out, left, right, groups, accumulate)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit


def _room(out: Tensor) -> Tensor:
    """An empty matrix as large as out, or larger where the library wants even sizes."""
    rows, columns = out.shape
    return out.new_empty(_up(rows, _ROWS), _up(columns, _BYTES))


def _codes(codes: Tensor, rows: int) -> Tensor:
    """float8 [rows, depth rounded up]: the codes with zeros about them where sizes are odd."""
    have_rows, depth = codes.shape
    wanted = _up(depth, TILE)
    if (have_rows, depth) != (rows, wanted):
        codes = pad(codes, (0, wanted - depth, 0, rows - have_rows))
    elif codes.stride(0) % _BYTES or codes.data_ptr() % _BYTES:
        codes = codes.contiguous()
    return codes.view(torch.float8_e4m3fn)


def _tile_scales(scales: Tensor, rows: int) -> Tensor:
    """float32 [rows, tiles] with strides (1, rows)."""
    if scales.shape[0] != rows:
        scales = pad(scales, (0, 0, 0, rows - scales.shape[0]))
    return scales.t().contiguous().t()


def _block_scales(scales: Tensor) -> Tensor:
    """float32 [tiles rounded up to 4, tile rows], tiles adjacent, of scales [tile rows, tiles]."""
    tiles = scales.shape[1]
    return pad(scales, (0, _up(tiles, 4) - tiles)).contiguous().t()
