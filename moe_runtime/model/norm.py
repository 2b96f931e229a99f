"""RMSNorm that keeps its input and one number a row. Ref: DSV3 §4.2 (norms after the latents too)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_runtime.model.recompute import Recomputed

# normalise(x, gain, eps): output in the dtype of x, reciprocal root mean square in at least FP32, any shape.
Normalise = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
_KERNEL = "_fused_rms_norm_backward"


def normalise(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(output in the dtype of x, reciprocal root mean square [..., 1]), computed in at least FP32."""
    if _has_kernel(x, gain):
        out, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], gain, eps)
        return out, rstd
    high = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(high, dim=-1, keepdim=True)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(high, rstd).mul_(gain).to(x.dtype), rstd


def _has_kernel(x: Tensor, gain: Tensor) -> bool:
    """True where torch norms in one pass, with FP32 inside."""
    return x.is_cuda and x.dtype == gain.dtype != torch.float64 and hasattr(torch.ops.aten, _KERNEL)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, normalise: Normalise) -> Tensor:
        out, rstd = normalise(x, gain, eps)
        ctx.save_for_backward(x, gain, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gain, rstd = ctx.saved_tensors
        dim = x.shape[-1]
        if _has_kernel(x, gain):
            backward = torch.ops.aten._fused_rms_norm_backward
            return *backward(d_out.to(x.dtype), x, [dim], rstd, gain, [True, True]), None, None
        high = x.to(rstd.dtype).reshape(-1, dim)
        scale = rstd.reshape(-1, 1)
        d_out = d_out.to(rstd.dtype).reshape(-1, dim)
        wide_gain = gain.to(rstd.dtype)
        dot = d_out * high
        d_gain = torch.mv(dot.t(), scale.squeeze(1))
        # d_x = rstd (g d_out) - x rstd^3 mean(g d_out x)
        pull = torch.mv(dot, wide_gain).unsqueeze(1).mul_(scale.pow(3)).div_(dim)
        d_x = torch.mul(d_out, wide_gain, out=dot).mul_(scale).addcmul_(high, pull, value=-1)
        return d_x.to(x.dtype).view(x.shape), d_gain.to(gain.dtype), None, None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain, in at least FP32 inside.

    `normalise` computes it; one that also casts its output may be put in its place.

    Args:
        dim: width of the last axis.
        eps: added to the mean square.
    """

    def __init__(
        self, dim: int, eps: float, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.normalise: Normalise = normalise
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x [..., dim]."""
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.normalise)
        return out

    def recomputed(self, x: Tensor, users: int, plain: bool = False) -> Recomputed[Tensor]:
        """The same output as `forward`, to be made again in backward. Ref: DSV3 §3.2.3.

        Args:
            plain: no user reads more than the values.
        """
        x, gain, eps = x.detach(), self.weight, self.eps
        again = normalise if plain else self.normalise
        return Recomputed(lambda: again(x, gain, eps)[0], users)
