"""The routed part of a MoE layer as one differentiable call, where autograd runs the backward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from moe_comm import autograd
from moe_comm.dispatcher import Dispatcher
from moe_comm.errors import CommError, InputError, ReceiveOverflow
from moe_comm.round_plan import RoundPlan
from moe_comm.rounds import Experts, LayerInRounds, connected, plan_after, require_listed


def moe_layer(
    dispatcher: Dispatcher,
    tokens: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    experts: Experts,
    parameters: Sequence[Tensor],
) -> Tensor:
    """The routed part of a MoE layer under autograd: in one piece where that fits, else in rounds.

    Which of the two, all ranks decide alike, by the counts. Every rank of the group must run the
    backward too, in the same order.

    Args:
        dispatcher: any dispatcher; without `max_rows` everything fits.
        tokens: [tokens, hidden].
        weights: [tokens, top_k] gate weights.
        expert_ids: int64 [tokens, top_k], -1 for no choice.
        experts: (rows [n, hidden], row_weights [n], row_counts int64 [local_experts]) to outputs times
            weights [n, hidden]; n may be 0. Gives the same for the same rows again (no dropout). If it
            raises, the group is given up: its peers would wait.
        parameters: all tensors that `experts` reads beside its arguments and that need a gradient.

    Returns:
        [tokens, hidden], differentiable in tokens, weights and parameters.

    Raises:
        InputError: `experts` gives no tensor, or reads one that needs a gradient and is not in
            `parameters` (in rounds the backward raises it).
        CommError: what the dispatcher raises.
    """
    try:
        received = autograd.dispatch(dispatcher, tokens, weights, expert_ids)
    except ReceiveOverflow as overflow:
        plan = plan_after(overflow, dispatcher, expert_ids)
    else:
        with _or_give_up(dispatcher):
            rows = experts(received.rows, received.row_weights, received.row_counts)
        if not isinstance(rows, Tensor):
            raise InputError(f"moe_layer: expected a tensor of experts, got {type(rows).__name__}")
        if received.rows.requires_grad:
            rows = connected(rows, received.rows)
        if rows.requires_grad:
            require_listed(get_gradient_edge(rows).node, (*parameters, received.rows, received.row_weights))
        return autograd.combine(dispatcher, rows, received.handle)
    return _InRounds.apply(dispatcher, plan, experts, expert_ids, tokens, weights, *parameters)


@contextmanager
def _or_give_up(dispatcher: Dispatcher) -> Iterator[None]:
    """What goes wrong here goes wrong on this rank alone, while its peers wait for the next exchange."""
    try:
        yield
    except CommError:  # said to all, or by the transport itself
        raise
    except Exception as error:
        dispatcher.give_up(error)
        raise


class _InRounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        dispatcher: Dispatcher,
        plan: RoundPlan,
        experts: Experts,
        expert_ids: Tensor,
        tokens: Tensor,
        weights: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.dispatcher, ctx.plan, ctx.experts = dispatcher, plan, experts
        kind = tokens.device.type
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        ctx.save_for_backward(tokens, weights, expert_ids, *parameters)
        with _or_give_up(dispatcher):
            return LayerInRounds(dispatcher, plan, tokens, weights, expert_ids, experts).forward()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, expert_ids, *parameters = ctx.saved_tensors
        layer = LayerInRounds(ctx.dispatcher, ctx.plan, tokens, weights, expert_ids, ctx.experts)
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        # The experts run once more, as they ran in the forward.
        with _or_give_up(ctx.dispatcher), torch.autocast(*ctx.autocast):
            found = layer.backward(d_output, wanted)
        grads = iter(found.parameters)
        d_parameters = [next(grads) if parameter.requires_grad else None for parameter in parameters]
        return None, None, None, None, found.tokens, found.weights, *d_parameters
