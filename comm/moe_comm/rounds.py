"""A MoE layer in rounds: the memory of an exchange is bounded, whatever the router does.

Dropless means that a rank receives all it is sent; a router that sends every choice of every token to
one rank would take that machine down. A dispatcher with `max_rows` refuses such an exchange on all
ranks alike (`ReceiveOverflow`), and what it refused runs here, a part of the slots at a time
(`round_plan`):

    forward    per round    dispatch -> experts -> combine -> add to the output
    backward   per round    dispatch again, combine_backward of d_output
                            experts again, now with a graph, and their backward
                            dispatch_backward -> add to d_tokens and d_weights

Nothing of a round outlives it: forward keeps the layer's inputs alone, and backward makes the rows and
the experts' activations of one round again. So the layer holds, beyond its own inputs and outputs,

    at most 1.25 x max_rows x row_bytes

where `row_bytes` counts what a row must have about it at the fullest moment, and the quarter is for
indices, alignment and the temporaries of single operations. Inputs and outputs are tokens, weights,
expert_ids and output, with the gradients of tokens, weights and output; output and d_tokens are summed
over the rounds in at least FP32 and rounded once, and count with the width of that sum. Parameters and
their gradients are not of rows and not counted. These are live bytes. A C library may keep more of the
process than that: glibc holds on to freed blocks of up to 32 MiB, in each thread's arena, and the process
then measures about twice as much, unless the environment fixes MALLOC_MMAP_THRESHOLD_ (1000000, say).

The price is time: dispatch and the experts' forward run twice, and each round is as many collectives as
a whole exchange. All of them happen inside one call, in the same order on every rank.

Rejected: starting the next round's dispatch under this round's experts (two rounds in memory: half as
many rows in each for the same bytes); keeping the rows of forward for backward (that is the memory that
was to be saved); dropping what does not fit (changes what is learnt).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from moe_comm.dispatcher import Dispatcher, Pending, Received
from moe_comm.errors import InputError, ReceiveOverflow
from moe_comm.round_plan import RoundPlan, plan_rounds
from moe_comm.wire.carried import carry_over, carry_part
from moe_comm.wire.codec import AsIsCodec, wire_pair

# (rows [n, hidden], row_weights [n], row_counts int64 [local_experts]) -> outputs times weights [n, hidden]
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
Wait = Callable[[Pending[Any]], Any]


def row_bytes(
    hidden: int, width: int, dtype: torch.dtype, grad_dtype: torch.dtype | None = None, wire: str = "auto"
) -> int:
    """Bytes that one row needs at the fullest moment of a layer with SwiGLU experts.

    That is the larger of two moments:

        backward of the experts    the row [hidden], its two lifted halves [2 width] and their product
                                   [width]; the gradients of the expert's output [hidden], of the row
                                   [hidden], of the halves [2 width] and of the product [width]
        an exchange beside rows    the row, what is sent, what arrives, what arrived in its order [hidden]

    or  max((hidden + 3 width) item(dtype) + (2 hidden + 3 width) item(grad_dtype),  4 hidden item(dtype)),
    where what travels counts by its wire if that is wider. The first is larger unless width is below
    hidden / 6. The output's value is not in it: backward does not read it.

    Args:
        hidden: width of a row.
        width: inner width of an expert.
        dtype: of rows and activations.
        grad_dtype: in which the expert's backward holds gradients; None: `dtype`.
        wire: of the dispatcher.

    Ref: DSV3 (12), §3.2.3
    """
    grad_dtype = dtype if grad_dtype is None else grad_dtype
    experts = (hidden + 3 * width) * dtype.itemsize + (2 * hidden + 3 * width) * grad_dtype.itemsize
    travelling = max(
        sum(columns * kind.itemsize for columns, kind in codec.fields(hidden, dtype))
        for codec in (AsIsCodec(), *wire_pair(wire))
    )
    return max(experts, 2 * hidden * dtype.itemsize + 2 * travelling)


def plan_after(overflow: ReceiveOverflow, dispatcher: Dispatcher, expert_ids: Tensor) -> RoundPlan:
    """The plan of an exchange that a dispatcher refused.

    Args:
        overflow: what it raised.
        dispatcher: that dispatcher.
        expert_ids: int64 [tokens, top_k] of the exchange.
    """
    overflow.__traceback__ = None  # its frames hold the indices of the whole exchange
    assert dispatcher.max_rows is not None, "a dispatcher without max_rows does not overflow"
    lanes = getattr(dispatcher, "lanes", 1)  # only dispatchers that forward inside nodes have lanes
    return plan_rounds(expert_ids, overflow.rows_sent, dispatcher.placement, dispatcher.max_rows, lanes)


def _wait(pending: Pending[Any]) -> Any:
    return pending.wait()


@dataclass(frozen=True)
class RoundGradients:
    """What the backward of a layer in rounds gives.

    Args:
        tokens: [tokens, hidden].
        weights: [tokens, top_k]; 0 for a slot without a choice.
        parameters: one for each parameter asked for.
    """

    tokens: Tensor
    weights: Tensor
    parameters: tuple[Tensor, ...]


@dataclass(frozen=True)
class LayerInRounds:
    """Dispatch, experts and combine of one layer, forwards and backwards, round by round.

    Holds the layer's inputs and nothing else, so it is all that a forward needs to leave for its backward.
    All ranks of the group call the same methods in the same order.

    Args:
        dispatcher: any dispatcher.
        plan: of these expert_ids, made alike on all ranks.
        tokens: [tokens, hidden].
        weights: [tokens, top_k] gate weights.
        expert_ids: int64 [tokens, top_k], -1 for no choice.
        experts: called once a round and pass, also without rows; gives the same for the same rows again
            (no dropout).
        wait: waits for a pending operation; for callers that measure the time.
    """

    dispatcher: Dispatcher
    plan: RoundPlan
    tokens: Tensor
    weights: Tensor
    expert_ids: Tensor
    experts: Experts
    wait: Wait = _wait

    @torch.no_grad()
    def forward(self) -> Tensor:
        """The layer's output [tokens, hidden], in the dtype that combine gives.

        Raises:
            CommError: what the dispatcher raises.
        """
        total = torch.zeros_like(self.tokens, dtype=_wide(self.tokens))
        dtype = self.tokens.dtype
        for index in range(self.plan.num_rounds):
            dtype = self._forward_round(index, total)
        return total.to(dtype)

    @torch.no_grad()
    def backward(self, d_output: Tensor, parameters: Sequence[Tensor] | None = None) -> RoundGradients:
        """Gradients of `forward`, which need not have run in this object.

        Args:
            d_output: [tokens, hidden].
            parameters: tensors that the experts read, whose gradients are summed over the rounds and
                returned; None: they go where an ordinary backward leaves them, in `.grad` or with a hook.

        Raises:
            CommError: what the dispatcher raises.
        """
        d_tokens = torch.zeros_like(self.tokens, dtype=_wide(self.tokens))
        d_weights = torch.zeros_like(self.weights)
        totals = None if parameters is None else _Totals(parameters)
        dtype = self.tokens.dtype
        for index in range(self.plan.num_rounds):
            dtype = self._backward_round(index, d_output, d_tokens, d_weights, totals)
        d_parameters = () if totals is None else totals.rounded()
        return RoundGradients(d_tokens.to(dtype), d_weights, d_parameters)

    # The peak is in these two: whatever is not read again is let go of before the next buffer is made.

    def _forward_round(self, index: int, total: Tensor) -> torch.dtype:
        chosen, started = self._dispatch(index)
        received = self.wait(started)
        handle = received.handle
        outputs = self.experts(received.rows, received.row_weights, received.row_counts)
        del started, received
        returning = self.dispatcher.combine(outputs, handle)
        del outputs, handle
        return _add_to(total, chosen, self.wait(returning))

    def _backward_round(
        self, index: int, d_output: Tensor, d_tokens: Tensor, d_weights: Tensor, totals: "_Totals | None"
    ) -> torch.dtype:
        chosen, started = self._dispatch(index)
        received = self.wait(started)
        handle = received.handle
        # Waited for at once: under the experts' forward it would hold two more buffers beside theirs.
        d_outputs = self.wait(self.dispatcher.combine_backward(_rows_of(d_output, chosen), handle))
        rows = carry_over(received.rows, received.rows.detach()).requires_grad_()
        row_weights = received.row_weights.detach().requires_grad_()
        with torch.enable_grad():
            # An edge into the graph instead of the output itself: backward does not read its value.
            outputs = connected(self.experts(rows, row_weights, received.row_counts), rows)
            edge = get_gradient_edge(outputs)
        del started, received, outputs
        if totals is not None:
            require_listed(edge.node, (*totals.parameters, rows, row_weights))
        d_rows, d_row_weights = _pull_back(edge, d_outputs, rows, row_weights, totals)
        del d_outputs, edge, rows, row_weights
        returning = self.dispatcher.dispatch_backward(d_rows, d_row_weights, handle)
        del d_rows, d_row_weights, handle
        d_chosen, d_chosen_weights = self.wait(returning)
        _add_to(d_weights, chosen, d_chosen_weights)
        return _add_to(d_tokens, chosen, d_chosen)

    def _dispatch(self, index: int) -> tuple[Tensor, Pending[Received]]:
        """Start a round: its tokens, int64 [chosen], and their rows under way."""
        chosen, ids = self.plan.choose(index, self.expert_ids)
        weights = self.weights.index_select(0, chosen)
        return chosen, self.dispatcher.dispatch(_rows_of(self.tokens, chosen), weights, ids)


class _Totals:
    """Gradients of parameters, summed over rounds in at least FP32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = tuple(parameters)
        self._sums = [torch.zeros_like(parameter, dtype=_wide(parameter)) for parameter in parameters]

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for total, grad in zip(self._sums, grads, strict=True):
            if grad is not None:
                total.add_(grad)

    def rounded(self) -> tuple[Tensor, ...]:
        return tuple(s.to(p.dtype) for s, p in zip(self._sums, self.parameters, strict=True))


def connected(outputs: Tensor, rows: Tensor) -> Tensor:
    """Outputs of experts, with a way back to their rows also where there was none to compute.

    A rank without rows must take part in the exchanges of the backward all the same.
    """
    return outputs if outputs.requires_grad or outputs.numel() else rows.to(outputs.dtype)


def require_listed(node: Node, listed: Sequence[Tensor]) -> None:
    """Refuse experts that read a tensor whose gradient would be lost.

    Args:
        node: of the graph of the experts' outputs.
        listed: the tensors whose gradients are taken; what is behind them is not the experts'.

    Raises:
        InputError: names its shape.
    """
    ends = {get_gradient_edge(tensor).node for tensor in listed if tensor.requires_grad}
    seen, ahead = set(ends), [node]
    while ahead:
        here = ahead.pop()
        if here in seen:
            continue
        seen.add(here)
        leaf = getattr(here, "variable", None)
        if leaf is not None:
            raise InputError(
                f"moe_layer: expected every tensor that the experts read and that needs a gradient among "
                f"parameters, got another one of shape {list(leaf.shape)}"
            )
        ahead += [following for following, _ in here.next_functions if following is not None]


def _pull_back(
    edge: GradientEdge, d_outputs: Tensor, rows: Tensor, row_weights: Tensor, totals: _Totals | None
) -> tuple[Tensor, Tensor]:
    """Run the experts' backward: the gradients of rows and row_weights; those of parameters are left."""
    if totals is None:
        torch.autograd.backward(edge, d_outputs)
        d_rows, d_row_weights = rows.grad, row_weights.grad
    else:
        inputs = (rows, row_weights, *totals.parameters)
        d_rows, d_row_weights, *grads = torch.autograd.grad(edge, inputs, d_outputs, allow_unused=True)
        totals.add(grads)
    return (
        torch.zeros_like(rows) if d_rows is None else d_rows,
        torch.zeros_like(row_weights) if d_row_weights is None else d_row_weights,
    )


def _rows_of(values: Tensor, chosen: Tensor) -> Tensor:
    """The rows `chosen` of values [n, hidden], with the tiles that they carry."""
    return carry_part(values, values.index_select(0, chosen), chosen)


def _add_to(total: Tensor, chosen: Tensor, part: Tensor) -> torch.dtype:
    """Add `part` [chosen, ...] to lines of `total`, each at most once; gives the dtype of `part`."""
    total.index_copy_(0, chosen, total.index_select(0, chosen).add_(part))
    return part.dtype


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
