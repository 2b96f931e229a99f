"""Products of FP8 operands by emulation, on any device.

Two forms. `multiply_slowly` is the definition: partial sums of 128 products of codes, each multiplied by its
two scales and added in FP32, as kernels that promote every 128 do it. The back end `reference` decodes
both operands and multiplies once, in FP32 or, where the result is BF16 and all scales are powers of two, in
BF16 (decoded values are exact there and CPUs with BF16 units accumulate in FP32): the same up to the rounding
of FP32 sums.
"""

import torch
from torch import Tensor

from moe_runtime.fp8.cast import decode
from moe_runtime.fp8.cast_cpu import are_powers_of_two
from moe_runtime.fp8.cpu_units import cpu_multiplies_bf16
from moe_runtime.fp8.gemm_per_group import add_each, multiply_each
from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles, num_tiles

Right = Tiles | Blocks


def multiply_slowly(left: Tiles, right: Right) -> Tensor:
    """float32 [m, n] of left [m, k] and right [n, k], slice by slice of 128."""
    rows, depth = left.shape
    total = torch.zeros(rows, right.shape[0], device=left.codes.device)
    left_codes, right_codes = (_values_of_codes(matrix.codes) for matrix in (left, right))
    for tile in range(num_tiles(depth)):
        span = slice(tile * TILE, (tile + 1) * TILE)
        partial = left_codes[:, span] @ right_codes[:, span].t()
        right_scales = right.scales[:, tile]
        if isinstance(right, Blocks):
            right_scales = right_scales.repeat_interleave(TILE)[: right.shape[0]]
        total += partial * left.scales[:, tile : tile + 1] * right_scales
    return total


def _values_of_codes(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def multiply_into(out: Tensor, left: Tiles, right: Right, accumulate: bool) -> None:
    """Write or add left [m, k] times right [n, k] into out [m, n]."""
    dtype = torch.bfloat16 if out.dtype == torch.bfloat16 and _in_bf16(left, right) else torch.float32
    left_values, right_values = decode(left, dtype), decode(right, dtype).t()
    if out.dtype == torch.float32:
        # With beta 0 whatever `out` holds, NaN included, is ignored.
        torch.addmm(out, left_values, right_values, beta=1 if accumulate else 0, out=out)
    elif accumulate:
        out.add_(torch.mm(left_values, right_values))
    elif dtype == out.dtype:
        torch.mm(left_values, right_values, out=out)
    else:
        out.copy_(torch.mm(left_values, right_values))


def multiply_groups_into(out: Tensor, left: Tiles, right: Blocks, groups: Groups) -> None:
    """Write rows of each group times its matrix into out [m, n]; left [m, k], right [g, n, k]."""
    multiply_each(multiply_into, out, left, right, groups)


def weight_grad_groups(out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool) -> None:
    """Write or add the sums over each group's tokens into out [g, n, k]; left [n, t], right [k, t]."""
    add_each(multiply_into, out, left, right, groups, accumulate)


def _in_bf16(left: Tiles, right: Right) -> bool:
    """True if BF16 units serve and lose nothing: a decoded value is a code times a power of two."""
    # Not on a GPU: its library may round partial sums to BF16.
    is_fast = left.codes.device.type == "cpu" and cpu_multiplies_bf16()
    return is_fast and are_powers_of_two(left.scales) and are_powers_of_two(right.scales)
