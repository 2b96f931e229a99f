"""The back end `deepgemm`: DeepGEMM's kernels for Hopper, from the wheel `sgl-deep-gemm` (extra `deepgemm`).

    right     out    kernel
    Blocks    BF16   1d2d, one scale for each 128 x 128 block; writes only
    Tiles     FP32   1d1d, a scale for each row and each column; adds only
    other            the pair nearest to it, through a second pass

Groups of rows: the library's grouped kernel wants each group to begin at a multiple of 128 rows, which is a
copy of all rows there and back; so a group is a dense product of its own, written in its place. Groups of
tokens: the library wants each group's columns as a matrix of their own, which is one copy of the codes.

A wheel holds for the one version of torch that it was built with. Kernels are compiled by nvcc when a
shape is first met and kept in a folder (`DG_JIT_CACHE_DIR`, else in the home folder).
"""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from moe_runtime.errors import ConfigError
from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles

_TILES_RECIPE = (1, 1, 128)
_ROWS = 4  # rows of scales begin at multiples of 16 bytes
_BYTES = 16  # and rows of codes


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
    except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as error:
        raise ConfigError(
            f"the wheel sgl-deep-gemm for torch {torch.__version__} (extra deepgemm) and nvcc, got {error!r}"
        ) from error
    library: ModuleType = deep_gemm
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
    fits = out.stride(1) == 1 and out.stride(0) * out.element_size() % _BYTES == 0
    if is_blocks:
        target = out if fits and not accumulate else _room(out, torch.bfloat16)
        _library().fp8_gemm_nt(operands, (_codes(right.codes), right.scales), target)
    else:
        target = out if fits and out.dtype == torch.float32 else _room(out, torch.float32)
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
    start = 0
    for group, count in enumerate(groups.counts.tolist()):
        rows = slice(start, start + count)
        part = Tiles(left.codes[rows], left.scales[rows])
        multiply_into(out[rows], part, Blocks(right.codes[group], right.scales[group]), False)
        start += count


def weight_grad_groups(out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool) -> None:
    """Write or add the sums over each group's tokens into out [g, n, k]; left [n, t], right [k, t]."""
    if not out.numel():
        return
    counts = groups.padded_counts.tolist()
    is_direct = out.dtype == torch.float32 and out.is_contiguous()
    target = out if is_direct else torch.empty(out.shape, dtype=torch.float32, device=out.device)
    if not (is_direct and accumulate):
        target.zero_()
    used = [group for group, count in enumerate(counts) if count]
    if used:
        sizes = groups.padded_counts.to(torch.int32)
        _library().k_grouped_fp8_gemm_nt_contiguous(
            (_group_major(left.codes, counts), _scales(left.scales)),
            (_group_major(right.codes, counts), _scales(right.scales)),
            target,
            counts,
            sizes.to(out.device),
            c=target,
            recipe=_TILES_RECIPE,
        )
    if not is_direct:
        if accumulate:
            out.add_(target)
        else:
            out.copy_(target)


def _group_major(codes: Tensor, counts: list[int]) -> Tensor:
    """float8 [rows x tokens]: the codes [rows, tokens] with each group's tokens as a matrix of its own."""
    rows, tokens = codes.shape
    if tokens in counts:
        return codes.contiguous().view(-1).view(torch.float8_e4m3fn)
    flat = codes.new_empty(rows * tokens)
    start = 0
    for count in counts:
        flat[rows * start : rows * (start + count)].view(rows, count).copy_(codes[:, start : start + count])
        start += count
    return flat.view(torch.float8_e4m3fn)


def _as_tiles(blocks: Blocks) -> Tiles:
    """The same matrix with a scale for each row."""
    return Tiles(blocks.codes, blocks.scales.repeat_interleave(TILE, 0)[: blocks.shape[0]])


def _room(out: Tensor, dtype: torch.dtype) -> Tensor:
    """An empty matrix of out's size whose rows begin where the library wants them."""
    rows, columns = out.shape
    unit = _BYTES // dtype.itemsize
    return torch.empty(rows, -(-columns // unit) * unit, dtype=dtype, device=out.device)[:, :columns]


def _codes(codes: Tensor) -> Tensor:
    """float8 [rows, depth], adjacent rows that begin at multiples of 16 bytes."""
    rows, depth = codes.shape
    if depth % _BYTES:
        wide = codes.new_zeros(rows, -(-depth // _BYTES) * _BYTES)
        wide[:, :depth] = codes
        codes = wide
    elif not codes.is_contiguous() or codes.data_ptr() % _BYTES:
        codes = codes.clone(memory_format=torch.contiguous_format)
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
