"""What every rank of a gloo world runs to measure a MoE layer's memory under an adversarial router."""

from dataclasses import dataclass

import torch
from moe_comm.dispatcher import Dispatcher
from moe_comm.errors import ReceiveOverflow
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from moe_comm.rounds import LayerInRounds, plan_after, row_bytes
from torch import Tensor
from torch.nn import Parameter

from moe_runtime.model.experts import expert_ffn
from moe_runtime.model.product import widens
from moe_runtime.parallel.weight_grad import WeightGradSink, ensure_accumulator
from tests.dist.live_bytes import LiveBytes


@dataclass(frozen=True)
class Setting:
    """A layer and its load: every choice of every token is one of the experts of rank 0."""

    kind: str = "alltoall"
    tokens: int = 2048
    hidden: int = 256
    width: int = 128
    top_k: int = 8
    max_rows: int = 2048
    dtype: torch.dtype = torch.float32
    single_expert: bool = False


@dataclass(frozen=True)
class Measured:
    """Bytes of one rank.

    Args:
        forward, backward: live at the fullest moment.
        own: the layer's inputs and outputs.
        rows: max_rows x row_bytes.
        num_rounds: 1 if in one piece.
    """

    forward: int
    backward: int
    own: int
    rows: int
    num_rounds: int

    def ratio(self) -> float:
        """What is held beyond the rank's own inputs and outputs, over the bytes of max_rows rows."""
        return (max(self.forward, self.backward) - self.own) / self.rows


def _open(setting: Setting, rank: int, world: int, max_rows: int | None) -> Dispatcher:
    per_node = world // 2 if setting.kind == "two_hop" else None
    placement = Placement(setting.top_k * world, world, rank, ranks_per_node=per_node)
    return open_dispatcher(setting.kind, placement, max_rows=max_rows)


class _Layer:
    """Tokens, choices and experts of one rank; gradients of weights go in place into accumulators."""

    def __init__(self, setting: Setting, rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        shape = (setting.tokens, setting.hidden)
        self.tokens = torch.randn(shape, generator=generator).to(setting.dtype)
        self.weights = torch.rand(setting.tokens, setting.top_k, generator=generator)
        self.d_output = torch.randn(shape, generator=generator).to(setting.dtype)
        if setting.single_expert:
            self.ids = torch.full((setting.tokens, setting.top_k), -1)
            self.ids[:, 0] = 0
        else:
            self.ids = torch.rand(setting.tokens, setting.top_k, generator=generator).argsort(dim=1)
        self.gate_up = Parameter(0.1 * torch.ones(setting.top_k, 2 * setting.width, setting.hidden))
        self.down = Parameter(0.1 * torch.ones(setting.top_k, setting.hidden, setting.width))
        for parameter in (self.gate_up, self.down):
            parameter.data = parameter.data.to(setting.dtype)
        WeightGradSink().install((self.gate_up, self.down))
        self.kept = [self.gate_up, self.down, *map(ensure_accumulator, (self.gate_up, self.down))]

    def experts(self, rows: Tensor, row_weights: Tensor, row_counts: Tensor) -> Tensor:
        return expert_ffn(rows, row_weights, self.gate_up, self.down, row_counts)


def _own_bytes(layer: _Layer) -> int:
    """Inputs and outputs: tokens, weights, ids, output and the three gradients; sums in at least FP32."""
    wide = torch.promote_types(layer.tokens.dtype, torch.float32).itemsize
    values = (layer.tokens, layer.weights, layer.ids, layer.d_output, layer.weights)
    return sum(value.nbytes for value in values) + 2 * layer.tokens.numel() * wide


def measure_rounds(rank: int, world: int, setting: Setting) -> Measured:
    """Forward and backward in rounds, from the dispatcher's refusal on."""
    layer = _Layer(setting, rank)
    dispatcher = _open(setting, rank, world, setting.max_rows)
    with LiveBytes(layer.kept) as meter:
        try:
            dispatcher.dispatch(layer.tokens, layer.weights, layer.ids).wait()
        except ReceiveOverflow as overflow:
            plan = plan_after(overflow, dispatcher, layer.ids)
        rounds = LayerInRounds(dispatcher, plan, layer.tokens, layer.weights, layer.ids, layer.experts)
        output = rounds.forward()
        forward, meter.peak = meter.peak, meter.now
        found = rounds.backward(layer.d_output)
        assert output.shape == found.tokens.shape
    return _measured(setting, layer, forward, meter.peak, plan.num_rounds)


def measure_one_piece(rank: int, world: int, setting: Setting) -> Measured:
    """The same layer without a bound."""
    layer = _Layer(setting, rank)
    dispatcher = _open(setting, rank, world, None)
    with LiveBytes(layer.kept) as meter:
        received = dispatcher.dispatch(layer.tokens, layer.weights, layer.ids).wait()
        rows, row_weights = received.rows.requires_grad_(), received.row_weights.requires_grad_()
        outputs = layer.experts(rows, row_weights, received.row_counts)
        output = dispatcher.combine(outputs.detach(), received.handle).wait()
        forward, meter.peak = meter.peak, meter.now
        outputs.backward(dispatcher.combine_backward(layer.d_output, received.handle).wait())
        d_tokens, _ = dispatcher.dispatch_backward(rows.grad, row_weights.grad, received.handle).wait()
        assert output.shape == d_tokens.shape
    return _measured(setting, layer, forward, meter.peak, 1)


def _measured(setting: Setting, layer: _Layer, forward: int, backward: int, num_rounds: int) -> Measured:
    # A CPU without BF16 units computes the gradients of BF16 experts in FP32.
    grad_dtype = torch.float32 if widens(layer.tokens) else setting.dtype
    rows = setting.max_rows * row_bytes(setting.hidden, setting.width, setting.dtype, grad_dtype)
    return Measured(forward, backward, _own_bytes(layer), rows, num_rounds)
