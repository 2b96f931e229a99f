"""Matrix products of the model, in the arithmetic that this processor does best.

A CPU without BF16 units multiplies BF16 by emulation, four to five times slower than FP32. There the
operands are widened to FP32, multiplied, and the result is rounded once: more exact than BF16 units,
never less, and several times faster. Everywhere else operands are multiplied as they come. FP32 and
FP64 always stay what they are.
"""

import functools

import torch
from torch import Tensor

from moe_runtime.fp8.cpu_units import cpu_multiplies_bf16


def widens(tensor: Tensor) -> bool:
    """True if products of `tensor` are better done in FP32 on this device."""
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and not cpu_multiplies_bf16()


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in the dtype in which this device multiplies it best; the same object if unchanged."""
    return tensor.to(torch.float32) if widens(tensor) else tensor


@functools.cache
def _adds_in_fp32(device: torch.device) -> bool:
    """True where torch adds a product of BF16 to an FP32 sum in one call; tried once a device."""
    if device.type != "cuda":
        return False
    sums, ones = torch.zeros(16, 16, device=device), torch.ones(16, 16, device=device, dtype=torch.bfloat16)
    try:
        torch.addmm(sums, ones, ones, out_dtype=torch.float32, beta=1, out=sums)  # type: ignore[call-overload]
    except (RuntimeError, TypeError):
        return False
    return bool((sums == 16).all())


def product(left: Tensor, right: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """left [m, k] times right [k, n], rounded to `out_dtype` (default: the dtype of `left`)."""
    if out_dtype is None and left.dtype != torch.bfloat16:  # the short way, for products of a token or two
        return torch.mm(left, right)
    return torch.mm(wide(left), wide(right)).to(out_dtype or left.dtype)


def write_product(out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> None:
    """out [m, n] = or += left [m, k] times right [k, n]; `out` may be wider than the operands.

    Then nothing is rounded to the operands' dtype in between: weight gradients are summed in FP32, on a
    GPU in the pass that makes them.
    """
    # With beta 0 whatever `out` holds, NaN included, is ignored.
    beta = 1 if accumulate else 0
    if out.dtype == wide(left).dtype:
        torch.addmm(out, wide(left), wide(right), beta=beta, out=out)
    elif left.dtype == torch.bfloat16 and out.dtype == torch.float32 and _adds_in_fp32(out.device):
        torch.addmm(out, left, right, out_dtype=torch.float32, beta=beta, out=out)  # type: ignore[call-overload]
    elif accumulate:
        out.add_(unrounded_product(left, right, out.dtype))
    else:
        out.copy_(unrounded_product(left, right, out.dtype))


def unrounded_product(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
    """left [m, k] times right [k, n] in the wider of the two dtypes, from operands as they are.

    BF16 units of a CPU round their products, so there operands are widened first.
    """
    dtype = torch.promote_types(left.dtype, out_dtype)
    if left.is_cuda and left.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))
