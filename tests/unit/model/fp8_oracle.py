"""FP8 layers written down slowly: autograd around decoded operands and `torch.mm`, an expert at a time.

Everything here is FP32. What a product sees of its operands is what the casts make of them, whatever the
fast path shares, keeps or makes again.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.fp8 import cast
from moe_runtime.fp8.policy import Choice

ALL = Choice()


def columns(x: Tensor) -> Tensor:
    """x [m, k] after a cast along tokens."""
    return cast.decode(cast.cast_columns(x))[:, : x.shape[0]].t()


def rows(x: Tensor) -> Tensor:
    """x [m, k] after a cast along features."""
    return cast.decode(cast.cast_rows(x))


def retiled(x: Tensor) -> Tensor:
    """x [m, k] as a weight gradient sees it: cast along features, then along tokens."""
    return cast.decode(cast.columns_of(cast.cast_rows(x)))[:, : x.shape[0]].t()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, for_wgrad: Tensor, choice: Choice) -> Tensor:
        ctx.save_for_backward(weight, for_wgrad)
        ctx.choice = choice
        x, weight = (rows(x), cast.decode(cast.cast_weight(weight))) if choice.fprop else (x, weight)
        return torch.mm(x, weight.t())

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        weight, x = ctx.saved_tensors
        choice, d_y = ctx.choice, d_y.contiguous()
        back = (rows(d_y), cast.decode(cast.cast_weight(weight))) if choice.dgrad else (d_y, weight)
        d_columns = columns(d_y) if choice.wgrad else d_y
        return torch.mm(*back), torch.mm(d_columns.t(), x), None, None


def linear(x: Tensor, weight: Tensor, choice: Choice = ALL) -> Tensor:
    """x [m, k] times weight [n, k] transposed."""
    for_wgrad = retiled(x.detach()) if choice.wgrad else rows(x.detach())
    out: Tensor = _Product.apply(x, weight, for_wgrad, choice)
    return out


class _Gate(torch.autograd.Function):
    """silu(gate) x up x weight: forward of what comes in, backward of what its cast keeps of it."""

    @staticmethod
    def forward(ctx: Any, lifted: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows(lifted), weights)
        gate, up = lifted.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up * weights.unsqueeze(1)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lifted, weights = (saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            gate, up = lifted.chunk(2, dim=-1)
            product = nn.functional.silu(gate) * up * weights.unsqueeze(1)
        return torch.autograd.grad(product, (lifted, weights), d_out)


def ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, row_weights: Tensor | None = None, choice: Choice = ALL
) -> Tensor:
    """SwiGLU of x [m, h]; gate_up [2f, h], down [h, f], row_weights [m]."""
    weights = x.new_ones(x.shape[0]) if row_weights is None else row_weights
    lifted = linear(x, gate_up, choice)
    product = _Gate.apply(lifted, weights)
    gate, up = rows(lifted.detach()).chunk(2, dim=-1)
    again = nn.functional.silu(gate) * up * weights.detach().unsqueeze(1)
    for_wgrad = columns(again) if choice.wgrad else again
    out: Tensor = _Product.apply(product, down, for_wgrad, choice)
    return out


def experts(
    x: Tensor,
    row_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    counts: Tensor,
    choice: Choice = ALL,
) -> Tensor:
    """Each expert's SwiGLU on its rows, one expert after the other."""
    spans = zip(x.split(counts.tolist()), row_weights.split(counts.tolist()), strict=True)
    outs = [
        ffn(part, gate_up[expert], down[expert], weights, choice)
        for expert, (part, weights) in enumerate(spans)
    ]
    return torch.cat(outs)
