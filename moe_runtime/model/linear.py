"""The linear layer: bias-free, with a weight gradient that can be deferred and an input made again."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_runtime.model.product import product, wide, write_product
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.weight_grad import deliver


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, source: Recomputed[Tensor] | None, out_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.weight, ctx.source, ctx.shape, ctx.dtype = weight, source, x.shape, x.dtype
        if source is None and ctx.needs_input_grad[1]:
            ctx.save_for_backward(x)
        flat = x.reshape(-1, x.shape[-1])
        if out_dtype is not None:
            flat, weight = flat.to(out_dtype), weight.to(out_dtype)
        return product(flat, weight.t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, source = ctx.weight, ctx.source
        d_flat = wide(d_out.reshape(-1, d_out.shape[-1]))
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = product(d_flat, weight.to(d_flat.dtype), ctx.dtype).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            saved = ctx.saved_tensors

            def write(out: Tensor, accumulate: bool) -> None:
                x = saved[0] if source is None else source.take()
                x = x.reshape(-1, x.shape[-1]).to(d_flat.dtype)
                write_product(out, d_flat.t(), x, accumulate)

            d_weight = deliver(weight, write)
        return d_x, d_weight, None, None


def linear(
    x: Tensor, weight: Tensor, source: Recomputed[Tensor] | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x [..., in] times weight [out, in] transposed, giving [..., out].

    Args:
        source: makes x again in backward; x itself is then not kept.
        out_dtype: multiply in this dtype and leave the result in it (the router's logits: FP32).
    """
    out: Tensor = _Linear.apply(x, weight, source, out_dtype)
    return out


class Multiplier(Protocol):
    """What multiplies in a `Linear`. An input is handed back to it in the form in which it keeps one."""

    def __call__(self, x: Tensor, weight: Tensor, source: Recomputed[Any] | None = None) -> Tensor:
        """As `linear`, differentiable."""
        ...

    def keep(self, x: Tensor, users: int) -> Recomputed[Any]:
        """A source for `users` requests, where x is kept for more than the weight gradient."""
        ...

    def again(self, kept: Any, weight: Tensor) -> Tensor:
        """The same product, bit for bit, from what a source gave; for backward, without autograd."""
        ...


class PlainMultiplier:
    """Products in the dtype of the operands."""

    def __call__(self, x: Tensor, weight: Tensor, source: Recomputed[Any] | None = None) -> Tensor:
        return linear(x, weight, source)

    def keep(self, x: Tensor, users: int) -> Recomputed[Any]:
        kept = x.detach()
        return Recomputed(lambda: kept, users)

    def again(self, kept: Any, weight: Tensor) -> Tensor:
        flat = product(kept.reshape(-1, kept.shape[-1]), weight.detach().t())
        return flat.view(*kept.shape[:-1], weight.shape[0])


class Linear(nn.Module):
    """A bias-free linear layer; `multiplier` multiplies, and another may be put in its place.

    Args:
        in_features: width of the input.
        out_features: width of the output.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype, device=device))
        self.multiplier: Multiplier = PlainMultiplier()

    def forward(self, x: Tensor, source: Recomputed[Any] | None = None) -> Tensor:
        """x [..., in_features] -> [..., out_features]; `source` as in `linear`."""
        return self.multiplier(x, self.weight, source)
