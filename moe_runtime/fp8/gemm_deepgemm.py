"""The back end `deepgemm`: DeepGEMM's kernels for Hopper, from the wheel `sgl-deep-gemm` (extra `deepgemm`).

    right     out    kernel
    Blocks    BF16   1d2d, one scale for each 128 x 128 block; writes only
    Tiles     FP32   1d1d, a scale for each row and each column; adds only
    other            the pair nearest to it, through a second pass

Groups of rows and of tokens: `gemm_deepgemm_groups`.

A wheel holds for the versions of torch that it was built with. Kernels are compiled by nvcc, seconds each,
when a way of cutting a product up is first met, and kept in a folder (`DG_JIT_CACHE_DIR`, else in the home
folder). Sizes are no constants in them, so that other counts of rows need another kernel only where the
library cuts them up another way.
"""

import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_runtime.errors import ConfigError
from moe_runtime.fp8.gemm_deepgemm_groups import add_tokens, multiply_rows, words
from moe_runtime.fp8.gemm_per_group import add_each, multiply_each
from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles

_TILES_RECIPE = (1, 1, 128)
_ROWS = 4  # rows of scales begin at multiples of 16 bytes
_BYTES = 16  # and rows of codes and of results
_COLUMNS = 8  # of a BF16 result; the kernel stops the device at another number


@cache
def why_not(device: torch.device) -> str | None:
    """Why this back end cannot run on a device; None if it can."""
    if device.type != "cuda":
        return f"a CUDA device, got {device.type}"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return f"a Hopper GPU, got {torch.cuda.get_device_name(device)}"
    try:
        _library()
    except ConfigError as error:
        return str(error)
    return None


@cache
def _library() -> ModuleType:
    """DeepGEMM; loading it fails in many ways where torch, CUDA or nvcc are not those it was built for."""
    try:
        import deep_gemm
        from deep_gemm.cuda_helpers import find_cuda_home
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"the wheel sgl-deep-gemm for torch {torch.__version__} (extra deepgemm) and nvcc, got {error!r}"
        ) from error
    library: ModuleType = deep_gemm
    if not (Path(find_cuda_home()) / "bin" / "nvcc").exists() and os.environ.get("DG_JIT_USE_NVRTC") != "1":
        raise ConfigError(f"nvcc in {find_cuda_home()}/bin for DeepGEMM (or DG_JIT_USE_NVRTC=1), got none")
    alignment = library.get_mk_alignment_for_contiguous_layout()
    if TILE % alignment:
        raise ConfigError(f"DeepGEMM with groups of {TILE} rows, got {alignment}")
    return library


def multiply_into(out: Tensor, left: Tiles, right: Blocks | Tiles, accumulate: bool) -> None:
    """Write or add left [m, k] times right [n, k] into out [m, n]."""
    if not out.numel():
        return
    if not left.shape[1]:
        if not accumulate:
            out.zero_()
        return
    is_blocks = isinstance(right, Blocks) and out.dtype == torch.bfloat16
    operands = (_codes(left.codes), _scales(left.scales))
    if isinstance(right, Blocks) and not is_blocks:
        right = _as_tiles(right)
    fits = _fits(out)
    if is_blocks:
        columns = out.shape[1]
        spare = -columns % _COLUMNS
        target = out if fits and not accumulate and not spare else _room(out, torch.bfloat16)
        codes = right.codes if not spare else pad(right.codes, (0, 0, 0, spare))
        _library().fp8_gemm_nt(operands, (_codes(codes), right.scales), target)
        target = target[:, :columns] if spare else target
    else:
        target = out if fits and out.dtype == torch.float32 else _room(out, torch.float32)[:, : out.shape[1]]
        if target is not out or not accumulate:
            target.zero_()
        _library().fp8_gemm_nt(
            operands, (_codes(right.codes), _scales(right.scales)), target, c=target, recipe=_TILES_RECIPE
        )
    if target is not out:
        if accumulate:
            out.add_(target)
        else:
            out.copy_(target)


def multiply_groups_into(out: Tensor, left: Tiles, right: Blocks, groups: Groups) -> None:
    """Write rows of each group times its matrix into out [m, n]; left [m, k], right [g, n, k]."""
    if not out.numel():
        return
    if not left.shape[1]:
        out.zero_()
        return
    if out.dtype != torch.bfloat16 or out.shape[1] % _COLUMNS:
        multiply_each(multiply_into, out, left, right, groups)
        return
    num_groups, columns, depth = right.shape
    flat = _codes(right.codes.reshape(-1, depth))
    weights = Blocks(flat.view(num_groups, columns, -1), right.scales)
    target = out if _fits(out) else _room(out, torch.bfloat16)
    multiply_rows(_library(), target, Tiles(_codes(left.codes), _scales(left.scales)), weights, groups)
    if target is not out:
        out.copy_(target)


def weight_grad_groups(out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool) -> None:
    """Write or add the sums over each group's tokens into out [g, n, k]; left [n, t], right [k, t]."""
    if not out.numel():
        return
    if out.shape[-1] * torch.float32.itemsize % _BYTES:
        add_each(multiply_into, out, left, right, groups, accumulate)
        return
    is_direct = out.dtype == torch.float32 and out.is_contiguous()
    target = out if is_direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    if not (is_direct and accumulate):
        target.zero_()
    if groups.num_rows:
        left, right = (Tiles(_codes(x.codes), _scales(x.scales)) for x in (left, right))
        add_tokens(_library(), target, left, right, groups)
    if not is_direct:
        if accumulate:
            out.add_(target)
        else:
            out.copy_(target)


def _as_tiles(blocks: Blocks) -> Tiles:
    """The same matrix with a scale for each row."""
    return Tiles(blocks.codes, blocks.scales.repeat_interleave(TILE, 0)[: blocks.shape[0]])


def _fits(out: Tensor) -> bool:
    """Whether the library can write into it."""
    rows_fit = out.stride(0) * out.element_size() % _BYTES == 0
    return out.stride(1) == 1 and rows_fit and out.data_ptr() % _BYTES == 0


def _room(out: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty matrix of out's size, and some columns more where rows must begin at multiples of 16 bytes."""
    rows, columns = out.shape
    unit = _BYTES // dtype.itemsize
    return torch.empty(rows, -(-columns // unit) * unit, dtype=dtype, device=out.device)


def _codes(codes: Tensor) -> Tensor:
    """float8 [rows, depth], adjacent rows that begin at multiples of 16 bytes."""
    rows, depth = codes.shape
    if depth % _BYTES:
        wide = codes.new_zeros(rows, -(-depth // _BYTES) * _BYTES)
        wide[:, :depth] = codes
        codes = wide
    elif not codes.is_contiguous() or codes.data_ptr() % _BYTES:
        codes = words(codes).clone(memory_format=torch.contiguous_format)
    return codes.view(torch.float8_e4m3fn)


def _scales(scales: Tensor) -> Tensor:
    """float32 [rows, tiles] with strides (1, rows rounded up to 4)."""
    rows, tiles = scales.shape
    wanted = (1, -(-rows // _ROWS) * _ROWS)
    if scales.stride() != wanted:
        wide = scales.new_empty(tiles, wanted[1])
        wide[:, :rows] = scales.t()
        scales = wide[:, :rows].t()
    return scales
