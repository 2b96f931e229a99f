"""Routed experts: one SwiGLU per group of rows. Ref: DSV3 (12).

Rows arrive sorted by expert, so that the rows of one expert are a slice. One Function covers the whole
expert, from rows to weighted outputs: between its GEMMs lie only cheap elementwise steps, which it does
expert by expert while the data is in the processor's cache, and it keeps the rows, gate_up's output and
(unless recomputed) the product, nothing else.

A row's gate weight multiplies the product before the down projection: the same as multiplying the
output, on a tensor that is narrower. Its gradient falls out of the same numbers.

    forward    h = rows G^T    p = silu(h_gate) h_up    out = (w p) D^T
    backward   t = d_out D     d_w = sum(t p)   d_D = d_out^T (w p)   d_h = (w t) through SwiGLU
               d_rows = d_h G                   d_G = d_h^T rows

On CUDA in BF16 all experts are multiplied together, by grouped GEMMs (`experts_grouped.py`); elsewhere each
expert with rows is a block of its own. Measured on CPU, a loop of GEMMs is as fast as torch's grouped one.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from moe_comm.wire.carried import decoded
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_runtime.model.ffn import gated, gated_backward
from moe_runtime.model.product import wide, write_product
from moe_runtime.model.weight_grad import deliver


class OneExpert:
    """The rows of one expert, and products with its weight."""

    def __init__(self, expert: int, start: int, stop: int) -> None:
        self.expert, self.rows = expert, slice(start, stop)

    def lift(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write x [rows, in] times weight [experts, out, in] of this block, transposed."""
        write_product(out, x, weight[self.expert].t())

    def back(self, d_out: Tensor, weight: Tensor, out: Tensor) -> None:
        """Write d_out [rows, out] times weight [experts, out, in] of this block."""
        write_product(out, d_out, weight[self.expert])

    def write_weight_grad(self, out: Tensor, d_out: Tensor, x: Tensor, accumulate: bool) -> None:
        """d_out^T x into this block of out [experts, out, in]."""
        write_product(out[self.expert], d_out.t(), x, accumulate)


class _AllExperts:
    """All rows in one block, multiplied by grouped GEMMs.

    But weight gradients, which are added in FP32 while they are made: a grouped GEMM would round them to
    BF16 and leave the addition to another pass over all of them.
    """

    def __init__(self, counts: Tensor, device: torch.device) -> None:
        self.rows = slice(0, None)
        # Not blocking: else the host would wait for all kernels before this copy.
        self.ends = counts.cumsum(0).to(torch.int32).to(device, non_blocking=True)
        self._counts = counts

    def lift(self, x: Tensor, weight: Tensor, out: Tensor) -> None:
        out.copy_(nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=self.ends))

    def back(self, d_out: Tensor, weight: Tensor, out: Tensor) -> None:
        out.copy_(nn.functional.grouped_mm(d_out, weight, offs=self.ends))

    def write_weight_grad(self, out: Tensor, d_out: Tensor, x: Tensor, accumulate: bool) -> None:
        each = blocks_of(self._counts, out.device, False)
        write_blocks(out, accumulate, each, lambda span: (d_out[span], x[span]))


Block = OneExpert | _AllExperts


def grouped_gemm_serves(rows: Tensor) -> bool:
    """True where one grouped GEMM is the fast way."""
    return rows.is_cuda and rows.dtype == torch.bfloat16 and hasattr(nn.functional, "grouped_mm")


def blocks_of(counts: Tensor, device: torch.device, grouped: bool) -> list[Block]:
    """Blocks that cover all rows in order; none for an expert without rows, if they are separate."""
    if grouped:
        return [_AllExperts(counts, device)]
    ends = counts.cumsum(0).tolist()
    spans = zip([0, *ends[:-1]], ends, strict=True)
    return [OneExpert(expert, start, stop) for expert, (start, stop) in enumerate(spans) if stop > start]


def times(x: Tensor, weights: Tensor) -> Tensor:
    """x [rows, f] times weights [rows], in the dtype of x."""
    return (x * weights.unsqueeze(1)).to(x.dtype)


def write_blocks(
    out: Tensor,
    accumulate: bool,
    blocks: list[Block],
    operands: Callable[[slice], tuple[Tensor, Tensor]],
) -> None:
    """Weight gradients of all experts into out [experts, out, in]; `operands` gives d_out and x of rows."""
    if not accumulate:
        touched = {block.expert for block in blocks if isinstance(block, OneExpert)}
        together = any(isinstance(block, _AllExperts) for block in blocks)
        for expert in range(0 if together else out.shape[0]):
            if expert not in touched:
                out[expert] = 0
    for block in blocks:
        block.write_weight_grad(out, *operands(block.rows), accumulate)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        row_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        counts: Tensor,
        recompute: bool,
    ) -> Tensor:
        blocks = blocks_of(counts, rows.device, False)
        lifted = rows.new_empty(rows.shape[0], gate_up.shape[1])
        kept = None if recompute else rows.new_empty(rows.shape[0], down.shape[2])
        out = torch.empty_like(rows)
        for block in blocks:
            span = block.rows
            block.lift(rows[span], gate_up, lifted[span])
            middle = gated(lifted[span], None if kept is None else kept[span])
            block.lift(times(middle, row_weights[span]), down, out[span])
        ctx.blocks, ctx.gate_up, ctx.down = blocks, gate_up, down
        ctx.save_for_backward(rows, row_weights, lifted, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_weights, lifted, kept = ctx.saved_tensors
        blocks, down, d_out = ctx.blocks, ctx.down, wide(decoded(d_out).contiguous())
        d_rows, d_lifted = torch.empty_like(rows), torch.empty_like(lifted, dtype=d_out.dtype)
        d_row_weights = torch.empty_like(row_weights)

        def middle_of(span: slice) -> Tensor:
            return gated(lifted[span]) if kept is None else kept[span]

        high = torch.promote_types(rows.dtype, torch.float32)
        for block in blocks:
            span = block.rows
            pull = torch.empty_like(lifted[span, : down.shape[2]], dtype=high)
            block.back(d_out[span], down, pull)
            d_row_weights[span] = (pull * middle_of(span)).sum(dim=-1)
            pull.mul_(row_weights[span].unsqueeze(1))
            gated_backward(pull, lifted[span], d_lifted[span])
            block.back(d_lifted[span], ctx.gate_up, d_rows[span])

        def write_down(out: Tensor, accumulate: bool) -> None:
            def operands(span: slice) -> tuple[Tensor, Tensor]:
                return d_out[span], times(middle_of(span), row_weights[span])

            write_blocks(out, accumulate, blocks, operands)

        def write_gate_up(out: Tensor, accumulate: bool) -> None:
            write_blocks(out, accumulate, blocks, lambda span: (d_lifted[span], rows[span]))

        d_down = deliver(down, write_down) if ctx.needs_input_grad[3] else None
        d_gate_up = deliver(ctx.gate_up, write_gate_up) if ctx.needs_input_grad[2] else None
        return d_rows, d_row_weights, d_gate_up, d_down, None, None


def expert_ffn(
    rows: Tensor,
    row_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    counts: Tensor,
    recompute: bool = False,
    grouped: bool | None = None,
) -> Tensor:
    """Each expert's SwiGLU on its rows, times the rows' weights.

    Args:
        rows: [rows, hidden], expert by expert.
        row_weights: [rows].
        gate_up: [experts, 2f, hidden], gate rows first; down: [experts, hidden, f].
        counts: int64 [experts] on the CPU, rows of each expert; any may be zero, all may be.
        recompute: make the SwiGLU product again in backward.
        grouped: one grouped GEMM for all experts; None: where it is the fast way.

    Returns:
        [rows, hidden].
    """
    rows = decoded(rows)
    if grouped is None:
        grouped = grouped_gemm_serves(rows)
    if grouped:
        from moe_runtime.model.experts_grouped import GroupedExperts

        ends = counts.cumsum(0).to(torch.int32).to(rows.device, non_blocking=True)
        each = blocks_of(counts, rows.device, False)
        together: Tensor = GroupedExperts.apply(rows, row_weights, gate_up, down, ends, each)
        return together
    out: Tensor = _Experts.apply(rows, row_weights, gate_up, down, counts, recompute)
    return out


class ExpertProducts(Protocol):
    """What computes experts, as `expert_ffn` does; it may ignore `recompute`."""

    def __call__(
        self,
        rows: Tensor,
        row_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        counts: Tensor,
        recompute: bool = False,
    ) -> Tensor: ...


class Experts(nn.Module):
    """The routed experts that this process holds. Ref: DSV3 (12).

    `compute` is what computes them; another may be put in its place.

    Args:
        num_experts: how many of them are here.
        hidden_size: width of the stream.
        width: inner width f of one expert.
        recompute: make SwiGLU products again in backward. Ref: DSV3 §3.2.3.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        width: int,
        recompute: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.compute: ExpertProducts = expert_ffn
        self.gate_up = nn.Parameter(
            torch.empty(num_experts, 2 * width, hidden_size, dtype=dtype, device=device)
        )
        self.down = nn.Parameter(torch.empty(num_experts, hidden_size, width, dtype=dtype, device=device))
        for weight in (self.gate_up, self.down):
            weight.is_expert = True  # type: ignore[attr-defined]

    def forward(self, rows: Tensor, row_weights: Tensor, counts: Tensor) -> Tensor:
        """rows [rows, hidden] sorted by expert, weights [rows], CPU counts [experts] -> [rows, hidden]."""
        return self.compute(rows, row_weights, self.gate_up, self.down, counts, self.recompute)
