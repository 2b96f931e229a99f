"""Products of FP8 operands: one function for each role, whatever computes it.

    role     value                                     operands
    dense    out[m, n] = sum_k left[m, k] right[n, k]  Tiles x Blocks: Fprop, Dgrad; Tiles x Tiles: Wgrad
    groups   the same, rows of group i with right[i]   Tiles x Blocks [g, n, k]
    wgrad    out[i][n, k] = sum over tokens of group i Tiles [n, tokens] x Tiles [k, tokens]

Sums are FP32 and are promoted every 128 products. Back ends: `reference` (emulation, any CPU), `scaled_mm`,
`triton`, `deepgemm`. `auto` takes what the table of `gemm_choice` says for the shape and the device; a back
end that is asked for by name and cannot run raises.

Ref: DSV3 §3.3.2
"""

from types import ModuleType

import torch
from torch import Tensor

from moe_runtime.errors import NumericsError
from moe_runtime.fp8 import gemm_reference
from moe_runtime.fp8.tiled import Blocks, Groups, Tiles, num_tiles

_OUT_DTYPES = (torch.bfloat16, torch.float32)


def multiply(
    left: Tiles, right: Blocks | Tiles, out_dtype: torch.dtype = torch.bfloat16, backend: str = "auto"
) -> Tensor:
    """[m, n] of out_dtype: left [m, k] times right [n, k].

    Args:
        out_dtype: bfloat16 or float32.
        backend: `auto`, `reference`, `scaled_mm`, `triton` or `deepgemm`.

    Raises:
        NumericsError: shapes or dtypes do not fit.
        ConfigError: the back end cannot run here.
    """
    (rows, _), (columns, _) = _two_axes(left), _two_axes(right)
    out = torch.empty(rows, columns, dtype=out_dtype, device=left.codes.device)
    return multiply_into(out, left, right, False, backend)


def multiply_into(
    out: Tensor, left: Tiles, right: Blocks | Tiles, accumulate: bool, backend: str = "auto"
) -> Tensor:
    """Write, or add if `accumulate`, left [m, k] times right [n, k] into out [m, n]; returns out."""
    (rows, depth), (columns, right_depth) = _two_axes(left), _two_axes(right)
    _check(depth == right_depth, f"left and right of one depth, got {depth} and {right_depth}")
    _check_out(out, [rows, columns])
    role = "dense" if isinstance(right, Blocks) else "wgrad"
    _backend(role, rows, columns, depth, out.device, backend).multiply_into(out, left, right, accumulate)
    return out


def multiply_groups(
    left: Tiles,
    right: Blocks,
    groups: Groups,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """[m, n] of out_dtype: rows of group i of left [m, k] times right[i], right [g, n, k]."""
    rows, depth = _two_axes(left)
    _check(len(right.shape) == 3, f"right [groups, n, k], got {list(right.shape)}")
    num_groups, columns, right_depth = right.shape
    _check(depth == right_depth, f"left and right of one depth, got {depth} and {right_depth}")
    _check_groups(groups, num_groups)
    _check(groups.num_rows == rows, f"groups of {rows} rows in all, got {groups.num_rows}")
    out = torch.empty(rows, columns, dtype=out_dtype, device=left.codes.device)
    _check_out(out, [rows, columns])
    chosen = _backend("groups", rows, columns, depth, out.device, backend, num_groups)
    chosen.multiply_groups_into(out, left, right, groups)
    return out


def weight_grad_groups(
    out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool, backend: str = "auto"
) -> Tensor:
    """Write, or add if `accumulate`, the sum over each group's tokens into out [g, n, k]; returns out.

    A group without tokens gives zeros, or adds nothing.

    Args:
        out: float32 or bfloat16.
        left: [n, padded tokens]; right: [k, padded tokens].
    """
    (rows, tokens), (columns, right_tokens) = _two_axes(left), _two_axes(right)
    padded = groups.num_padded
    _check(tokens == right_tokens == padded, f"{padded} tokens, got {tokens} and {right_tokens}")
    _check(out.dim() == 3, f"out [groups, n, k], got {list(out.shape)}")
    _check_groups(groups, out.shape[0])
    _check_out(out, [out.shape[0], rows, columns])
    chosen = _backend("wgrad_groups", rows, columns, tokens, out.device, backend, out.shape[0])
    chosen.weight_grad_groups(out, left, right, groups, accumulate)
    return out


def _backend(
    role: str, m: int, n: int, k: int, device: torch.device, wanted: str, groups: int = 0
) -> ModuleType:
    """The module that computes this product."""
    if device.type == "cpu" and wanted in ("auto", "reference"):
        return gemm_reference
    from moe_runtime.fp8 import gemm_choice  # type: ignore[attr-defined]

    chosen: ModuleType = gemm_choice.backend_for(role, m, n, k, device, wanted, groups=groups)
    return chosen


def _two_axes(matrix: Tiles | Blocks) -> tuple[int, int]:
    """(rows, columns) of an operand; its scales are checked too."""
    _check(isinstance(matrix, Tiles | Blocks), f"Tiles or Blocks, got {type(matrix).__name__}")
    _check(len(matrix.shape) == 2, f"an operand of two axes, got {list(matrix.shape)}")
    rows, columns = matrix.shape
    scale_rows = num_tiles(rows) if isinstance(matrix, Blocks) else rows
    wanted = [scale_rows, num_tiles(columns)]
    _check(list(matrix.scales.shape) == wanted, f"scales {wanted}, got {list(matrix.scales.shape)}")
    return rows, columns


def _check_groups(groups: Groups, num_groups: int) -> None:
    _check(groups.counts.numel() == num_groups, f"{num_groups} groups, got {groups.counts.numel()}")


def _check_out(out: Tensor, shape: list[int]) -> None:
    _check(list(out.shape) == shape, f"out {shape}, got {list(out.shape)}")
    _check(out.dtype in _OUT_DTYPES, f"out of bfloat16 or float32, got {out.dtype}")


def _check(is_right: bool, expected: str) -> None:
    if not is_right:
        raise NumericsError(f"FP8 product: expected {expected}")
