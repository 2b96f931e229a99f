"""Dispatch and combine as differentiable functions, for callers that leave the backward to autograd.

Both wait before they return. The backward of each is a collective too, so every rank of the group must
run the same backwards in the same order: also a rank that received no rows must put them through its
experts, or its backward would skip an exchange that the others wait in.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_comm.dispatcher import Dispatcher, Received


def dispatch(dispatcher: Dispatcher, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Received:
    """Send tokens to their experts; differentiable in tokens and weights.

    Args:
        dispatcher: any dispatcher.
        tokens: [tokens, hidden].
        weights: [tokens, top_k] gate weights.
        expert_ids: int64 [tokens, top_k].

    Returns:
        Received, whose rows and row_weights have gradients; its handle serves any number of combines.
    """
    return Received(*_Dispatch.apply(dispatcher, tokens, weights, expert_ids))


def combine(dispatcher: Dispatcher, rows: Tensor, handle: Any) -> Tensor:
    """Return rows to their tokens and sum; differentiable in rows.

    Args:
        dispatcher: the one that gave the handle.
        rows: [num_rows, hidden] expert outputs, already multiplied by their gate weights.
        handle: of the dispatch.

    Returns:
        [tokens, hidden].
    """
    return _Combine.apply(dispatcher, rows, handle)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dispatcher: Dispatcher, tokens: Tensor, weights: Tensor, expert_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        received = dispatcher.dispatch(tokens, weights, expert_ids).wait()
        ctx.dispatcher, ctx.handle = dispatcher, received.handle
        ctx.mark_non_differentiable(received.row_counts)
        return received.rows, received.row_weights, received.row_counts, received.handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, d_row_weights: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_tokens, d_weights = ctx.dispatcher.dispatch_backward(d_rows, d_row_weights, ctx.handle).wait()
        return None, d_tokens, d_weights, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dispatcher: Dispatcher, rows: Tensor, handle: Any) -> Tensor:
        ctx.dispatcher, ctx.handle = dispatcher, handle
        return dispatcher.combine(rows, handle).wait()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.dispatcher.combine_backward(d_tokens, ctx.handle).wait(), None
