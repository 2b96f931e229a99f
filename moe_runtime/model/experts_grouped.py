"""Routed experts by grouped GEMMs: all rows in one product, SwiGLU of all in one pass each way.

The same expert as in `experts.py`, for processors where many small products are slow. The SwiGLU product is
never kept: its backward makes it again in the pass that reads its factors anyway. Weight gradients are added
in FP32 expert by expert, see `experts.write_blocks`.
"""

from typing import Any

import torch
from moe_comm.wire.carried import decoded
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from moe_runtime.model.experts import OneExpert, write_blocks
from moe_runtime.model.ffn import gated, gated_backward, gated_kernels
from moe_runtime.model.weight_grad import deliver


def weigh(lifted: Tensor, row_weights: Tensor) -> Tensor:
    """silu(gate) x up x weight [rows, f] of lifted [rows, 2f], in its dtype."""
    kernels = gated_kernels(lifted)
    if kernels is not None:
        product: Tensor = kernels.gated(lifted, row_weights)
        return product
    high = torch.promote_types(lifted.dtype, torch.float32)
    return (gated(lifted.to(high)) * row_weights.unsqueeze(1)).to(lifted.dtype)


def weigh_backward(d_product: Tensor, lifted: Tensor, row_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of lifted [rows, 2f], the product again [rows, f], and the gradient of row_weights."""
    d_lifted = torch.empty_like(lifted)
    kernels = gated_kernels(lifted)
    if kernels is not None:
        return d_lifted, *kernels.gated_backward(d_product, lifted, d_lifted, row_weights)
    high = torch.promote_types(lifted.dtype, torch.float32)
    middle, pull, weights = gated(lifted.to(high)), d_product.to(high), row_weights.unsqueeze(1)
    gated_backward(pull * weights, lifted, d_lifted)
    d_weights = (pull * middle).sum(dim=-1).to(row_weights.dtype)
    return d_lifted, (middle * weights).to(lifted.dtype), d_weights


class GroupedExperts(torch.autograd.Function):
    """`apply(rows, row_weights, gate_up, down, ends, blocks)`; ends int32 [experts] on the device."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        row_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ends: Tensor,
        blocks: list[OneExpert],
    ) -> Tensor:
        lifted = grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
        ctx.save_for_backward(rows, row_weights, lifted)
        ctx.gate_up, ctx.down, ctx.ends, ctx.blocks = gate_up, down, ends, blocks
        return grouped_mm(weigh(lifted, row_weights), down.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, lifted = ctx.saved_tensors
        d_out, blocks = decoded(d_out).contiguous(), ctx.blocks
        pull = grouped_mm(d_out, ctx.down, offs=ctx.ends)
        d_lifted, middle, d_row_weights = weigh_backward(pull, lifted, row_weights)
        del pull
        d_rows = grouped_mm(d_lifted, ctx.gate_up, offs=ctx.ends)

        def write_down(out: Tensor, accumulate: bool) -> None:
            write_blocks(out, accumulate, blocks, lambda span: (d_out[span], middle[span]))

        def write_gate_up(out: Tensor, accumulate: bool) -> None:
            write_blocks(out, accumulate, blocks, lambda span: (d_lifted[span], rows[span]))

        d_down = deliver(ctx.down, write_down) if ctx.needs_input_grad[3] else None
        d_gate_up = deliver(ctx.gate_up, write_gate_up) if ctx.needs_input_grad[2] else None
        return d_rows, d_row_weights, d_gate_up, d_down, None, None
