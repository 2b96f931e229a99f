"""The back end `triton`: every role at any shape, on Hopper, with nothing but torch and triton.

Here a product becomes a launch of `gemm_triton_kernel`: which tiles, how many programs, where each begins.
The bulk copy engine wants rows that begin at multiples of 16 bytes; where a depth is no such multiple the
codes are copied once into rows that are.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import triton
from torch import Tensor

from moe_runtime.fp8.gemm_triton_kernel import DENSE, ROWS, TOKENS, product_kernel
from moe_runtime.fp8.tiled import Blocks, Groups, Tiles

_ROW_BYTES = 16
_PROGRAMS_OFF_GPU = 3  # for the interpreter; several, to show that tiles are shared out


@dataclass(frozen=True)
class Plan:
    """How a product is cut up.

    Args:
        block_m: rows of a tile: 64 or 128.
        block_n: columns of a tile, at most 128, the width that one scale of a block covers.
        num_warps: of a program.
        num_stages: tiles of 128 along the depth that are on their way at once.
        programs: that share a multiprocessor.
        band: rows of tiles that are gone through together.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 1
    band: int = 8


# Swept on an H200 (benchmarks/fp8_gemm.py). None beats these at all shapes by more than runs differ.
PLANS = {
    "dense": Plan(64, 128, 4, 3, programs=3),
    "groups": Plan(64, 128, 4, 3, programs=2, band=16),
    "wgrad": Plan(64, 128, 4, 3, programs=2, band=16),
    "wgrad_groups": Plan(64, 128, 4, 4, programs=2),
}

_row_places: WeakKeyDictionary[Groups, dict[int, Tensor]] = WeakKeyDictionary()


def why_not(device: torch.device) -> str | None:
    """Why this back end cannot run on a device; None if it can."""
    if device.type != "cuda":
        return f"a CUDA device, got {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"a Hopper GPU, got {torch.cuda.get_device_name(device)}"
    return None


def multiply_into(
    out: Tensor, left: Tiles, right: Blocks | Tiles, accumulate: bool, plan: Plan | None = None
) -> None:
    """Write or add left [m, k] times right [n, k] into out [m, n]."""
    plan = plan or PLANS["dense" if isinstance(right, Blocks) else "wgrad"]
    row_tiles = triton.cdiv(out.shape[0], plan.block_m)
    _launch(out, left, right, accumulate, plan, role=DENSE, row_tiles=row_tiles, places=None)


def multiply_groups_into(
    out: Tensor, left: Tiles, right: Blocks, groups: Groups, plan: Plan | None = None
) -> None:
    """Write rows of each group times its matrix into out [m, n]; left [m, k], right [g, n, k]."""
    plan = plan or PLANS["groups"]
    places = row_places(groups, plan.block_m)
    _launch(out, left, right, False, plan, role=ROWS, row_tiles=len(places), places=places)


def weight_grad_groups(
    out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool, plan: Plan | None = None
) -> None:
    """Write or add the sums over each group's tokens into out [g, n, k]; left [n, t], right [k, t]."""
    plan = plan or PLANS["wgrad_groups"]
    row_tiles = triton.cdiv(out.shape[1], plan.block_m)
    _launch(out, left, right, accumulate, plan, role=TOKENS, row_tiles=row_tiles, places=groups.padded_ends)


def row_places(groups: Groups, block_m: int) -> Tensor:
    """int32 [row tiles, 3] on the device: group, first row and end of its rows, for tiles of block_m rows.

    Made from the counts, which are on the CPU, so nothing waits for the device; kept for all products of the
    same groups.
    """
    kept = _row_places.setdefault(groups, {})
    if block_m not in kept:
        ends = groups.counts.cumsum(0)
        tiles = (groups.counts + block_m - 1) // block_m
        group = torch.repeat_interleave(torch.arange(len(tiles)), tiles)
        within = torch.arange(len(group)) - (tiles.cumsum(0) - tiles)[group]
        first_row = (ends - groups.counts)[group] + within * block_m
        places = torch.stack((group, first_row, ends[group]), 1)
        # Not blocking: else the host would wait for all kernels before this copy.
        kept[block_m] = places.to(torch.int32).to(groups.device, non_blocking=True)
    return kept[block_m]


def _launch(
    out: Tensor,
    left: Tiles,
    right: Blocks | Tiles,
    accumulate: bool,
    plan: Plan,
    *,
    role: Any,
    row_tiles: int,
    places: Tensor | None,
) -> None:
    """Run the kernel on as many programs as fit the device."""
    num_groups = out.shape[0] if role == TOKENS else 1
    num_rows, num_columns = out.shape[-2:]
    depth = left.shape[-1]
    num_tiles = num_groups * row_tiles * triton.cdiv(num_columns, plan.block_n)
    if not num_tiles:
        return
    if not depth:  # descriptors cannot describe nothing
        if not accumulate:
            out.zero_()
        return
    left_codes = _with_aligned_rows(left.codes)
    right_codes = _with_aligned_rows(right.codes.reshape(-1, depth))
    is_tiles = isinstance(right, Tiles)
    right_scale_strides = (0, *right.scales.stride())[-3:]
    num_programs = min(num_tiles, _multiprocessors(out.device) * plan.programs)
    _give_descriptors_memory()
    product_kernel[(num_programs,)](
        left_codes,
        left_codes.stride(0),
        left.scales,
        *left.scales.stride(),
        right_codes,
        right_codes.stride(0),
        right_codes.shape[0],
        right.scales,
        *right_scale_strides,
        out,
        out.stride(0) if role == TOKENS else 0,
        out.stride(-2),
        out if places is None else places,
        num_rows,
        num_columns,
        depth,
        row_tiles,
        num_tiles,
        ROLE=role,
        RIGHT_PER_ROW=is_tiles,
        ACCUMULATE=accumulate,
        BLOCK_M=plan.block_m,
        BLOCK_N=plan.block_n,
        BAND=plan.band,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
    )


def _with_aligned_rows(codes: Tensor) -> Tensor:
    """float8 [rows, depth]: the codes where each row begins at a multiple of 16 bytes."""
    if codes.stride(-1) != 1 or codes.stride(0) % _ROW_BYTES or codes.data_ptr() % _ROW_BYTES:
        rows, depth = codes.shape
        wide = codes.new_empty(rows, -(-depth // _ROW_BYTES) * _ROW_BYTES)
        wide[:, :depth] = codes
        codes = wide[:, :depth]
    return codes.view(torch.float8_e4m3fn)


@cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS_OFF_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _give_descriptors_memory() -> None:
    """Let kernels make their descriptors in memory of torch's allocator.

    At every launch: Triton keeps the allocator in a context variable, and autograd's threads have their own.
    """
    triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device="cuda"))
