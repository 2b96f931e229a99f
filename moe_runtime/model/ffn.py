"""The dense feed-forward network: SwiGLU."""

from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_runtime.model.linear import Linear
from moe_runtime.model.recompute import Recomputed


def gated_kernels(gate_up: Tensor) -> ModuleType | None:
    """SwiGLU in one kernel each way, where this device has it."""
    if not gate_up.is_cuda:
        return None
    from moe_runtime.model import gated_triton  # brings triton

    return gated_triton if gated_triton.serves(gate_up) else None


def gated(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """silu(gate) x up of gate_up [..., 2f], gate first; in at least FP32, rounded once to its dtype.

    Args:
        out: where to write it, [..., f] of the same dtype; None: a new tensor.
    """
    kernels = gated_kernels(gate_up)
    if kernels is not None:
        product: Tensor = kernels.gated(gate_up, None, out)
        return product
    gate, up = gate_up.chunk(2, dim=-1)
    out = gate_up.new_empty(gate.shape) if out is None else out
    high = torch.promote_types(gate.dtype, torch.float32)
    if high == gate.dtype:
        return torch.ops.aten.silu.out(gate, out=out).mul_(up)
    return out.copy_(nn.functional.silu(gate.to(high)).mul_(up))


def gated_backward(d_out: Tensor, gate_up: Tensor, d_gate_up: Tensor) -> None:
    """Write the gradient of `gated` into d_gate_up [..., 2f], of the dtype of gate_up or of FP32."""
    kernels = gated_kernels(gate_up)
    if kernels is not None:
        kernels.gated_backward(d_out, gate_up, d_gate_up)
        return
    gate, up = gate_up.chunk(2, dim=-1)
    d_gate, d_up = d_gate_up.chunk(2, dim=-1)
    high = torch.promote_types(gate.dtype, torch.float32)
    gate, d_out = gate.to(high), d_out.to(high)
    if d_gate_up.dtype == high:
        torch.ops.aten.silu.out(gate, out=d_up).mul_(d_out)
        torch.mul(d_out, up, out=d_gate)
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return
    d_up.copy_(nn.functional.silu(gate).mul_(d_out))
    d_gate.copy_(torch.ops.aten.silu_backward(d_out * up, gate))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> Tensor:
        gate_up = ctx.saved_tensors[0]
        d_gate_up = torch.empty_like(gate_up)
        gated_backward(d_out, gate_up, d_gate_up)
        return d_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) x up for gate_up [..., 2f], gate first: [..., f]."""
    out: Tensor = _SwiGLU.apply(gate_up)
    return out


class FeedForward(Protocol):
    """What computes a `SwiGLU`."""

    def __call__(self, ffn: "SwiGLU", x: Tensor, source: Recomputed[Any] | None) -> Tensor: ...


def plain_ffn(ffn: "SwiGLU", x: Tensor, source: Recomputed[Any] | None) -> Tensor:
    """x [..., hidden] -> [..., hidden] through the two linears, each as it multiplies."""
    gate_up = ffn.gate_up(x, source)
    again = None
    if ffn.recompute:
        kept = gate_up.detach()
        again = Recomputed(lambda: gated(kept))
    return ffn.down(swiglu(gate_up), again)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) x up(x)): a dense layer's FFN, and the shared experts taken together.

    `compute` is what computes it; another may be put in its place.

    Args:
        hidden_size: width of the stream.
        width: inner width f; `gate_up.weight` is [2f, hidden], gate rows first.
        recompute: keep the product's two factors only and multiply them again in backward.
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        recompute: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.compute: FeedForward = plain_ffn
        self.gate_up = Linear(hidden_size, 2 * width, dtype, device)
        self.down = Linear(width, hidden_size, dtype, device)

    def forward(self, x: Tensor, source: Recomputed[Any] | None = None) -> Tensor:
        """x [..., hidden] -> [..., hidden]; `source` makes x again in backward and is asked once."""
        return self.compute(self, x, source)
