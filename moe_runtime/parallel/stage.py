"""Runs one stage of the model, forwards and backwards, phase by phase, with a tape of its own.

Why not let autograd run the whole backward: a pipeline stage must be able to stop between phases, so
that another microbatch's phase runs while this one's tokens travel. So the graph is cut at every
phase. Forward of a phase: its floating inputs are detached and require grad, the function runs, and
(inputs, outputs) go on the tape. Backward of a phase: its outputs are given their gradients with
`torch.autograd.backward`, the gradients of its inputs are read off, the tape entry is dropped.
Dispatch and combine are not autograd at all: each starts, and is waited for by the first phase that
reads what it brings; their backwards are each other.

Rejected: one coroutine or thread per half of an overlapped pair (needs a barrier that can hang, and
an exception in a thread is lost); hooks inside one autograd graph (the engine's order is not ours).

A forward or backward is handed out as a list of `Step`s, which the caller runs in order, possibly
merged with another list (`parallel.overlap`). Values live in a `Flight`, one per microbatch.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_comm.dispatcher import Dispatcher, Received
from moe_comm.errors import ReceiveOverflow
from torch import Tensor

from moe_runtime.model.phase import BALANCE, LOSS, LOSS_MTP, SCALARS, Combine, Compute, Dispatch, Phase
from moe_runtime.parallel.rounds import BlockInRounds
from moe_runtime.parallel.weight_grad import WeightGrads, WeightGradSink, run_weight_grads

BOUNDARY = "resid"  # the slot that crosses from stage to stage


@dataclass(frozen=True)
class Step:
    """One indivisible piece of a forward or backward.

    Args:
        label: the phase's name; `_b` is added for its backward, `_w` for its weight gradient.
        layer: canonical prefix of the phase's module.
        run: does it.
    """

    label: str
    layer: str
    run: Callable[[], None]


@dataclass(frozen=True)
class ObjectiveWeights:
    """Derivative of the objective with respect to each scalar that a phase puts out."""

    loss: float
    loss_mtp: float
    balance: float

    def of(self, slot: str) -> float:
        return {LOSS: self.loss, LOSS_MTP: self.loss_mtp, BALANCE: self.balance}[slot]


@dataclass
class _Taped:
    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    received: Received | None = None


class _Started:
    """A communication under way; what it brings is stored when first needed."""

    def __init__(self, pending: Any, store: Callable[[Any], None]) -> None:
        self._pending = pending
        self._store = store

    def finish(self) -> None:
        """Wait and store; further calls do nothing."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._store(pending.wait())


@dataclass
class Flight:
    """Values of one microbatch in one stage.

    Args:
        state: slot -> value of the forward.
        grads: slot -> gradient, on the way back.
        token_shape: shape of the residual stream, [sequences, seq_len, hidden].
        scalars: (slot, layer, value) of every scalar put out.
        in_rounds: blocks, by layer, whose rows did not fit.
    """

    state: dict[str, Tensor]
    grads: dict[str, Tensor] = field(default_factory=dict)
    token_shape: torch.Size = field(default_factory=torch.Size)
    scalars: list[tuple[str, str, Tensor]] = field(default_factory=list)
    tape: dict[Phase, _Taped] = field(default_factory=dict)
    weight_grads: WeightGrads = field(default_factory=list)
    started: dict[str, list[_Started]] = field(default_factory=dict)
    handles: dict[str, Any] = field(default_factory=dict)
    in_rounds: dict[str, BlockInRounds] = field(default_factory=dict)

    def add_grad(self, slot: str, grad: Tensor) -> None:
        """Add to the gradient of a slot; the first one is kept as it is."""
        known = self.grads.get(slot)
        self.grads[slot] = grad if known is None else known + grad


@dataclass
class Clock:
    """Seconds that this rank stood still, by cause."""

    exchange_wait_s: float = 0.0
    transfer_wait_s: float = 0.0


class StageRunner:
    """Runs the phases of one chunk.

    Args:
        phases: the chunk's phases, in forward order.
        dispatcher: moves tokens to experts and back.
        sink: receives the weight gradients of the chunk's parameters.
        count_experts: called in training forwards with (layer, expert_ids int64 [tokens, top_k]).
        clock: where waiting times are added.
        rounds: run a block whose rows do not fit in rounds; else that ends the step with an error.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        dispatcher: Dispatcher,
        sink: WeightGradSink,
        count_experts: Callable[[str, Tensor], None],
        clock: Clock,
        rounds: bool = False,
    ) -> None:
        self.phases = tuple(phases)
        self._dispatcher = dispatcher
        self._sink = sink
        self._count_experts = count_experts
        self._clock = clock
        self._rounds = rounds

    # -- forward ---------------------------------------------------------------------------------

    def forward_steps(self, flight: Flight, *, training: bool) -> list[Step]:
        """The forward of `flight`, whose `state` holds the chunk's inputs, as steps to run in order."""
        return [
            Step(phase.name, phase.layer, self._forward_step(phase, flight, training))
            for phase in self.phases
        ]

    def _forward_step(self, phase: Phase, flight: Flight, training: bool) -> Callable[[], None]:
        if isinstance(phase, Dispatch):
            return lambda: self._dispatch(phase, flight, training)
        if isinstance(phase, Combine):
            return lambda: self._combine(phase, flight, training)
        return lambda: self._compute(phase, flight, training)

    def _compute(self, phase: Compute, flight: Flight, training: bool) -> None:
        values = self._inputs(phase, flight)
        if values is None:
            return
        taped = _Taped()
        if training:
            taped.inputs = values = {slot: _cut(value) for slot, value in values.items()}
            flight.tape[phase] = taped
        with torch.set_grad_enabled(training):
            results = phase.fn(*values.values())
        for slot, result in zip(phase.outputs, results, strict=True):
            if training and result.requires_grad:
                taped.outputs[slot] = result
            if slot in SCALARS:
                flight.scalars.append((slot, phase.layer, result.detach()))
            else:
                flight.state[slot] = result.detach()

    def _inputs(self, phase: Compute, flight: Flight) -> dict[str, Tensor] | None:
        """What a phase reads; None if these are rows that did not fit, and have now gone in rounds."""
        try:
            return {slot: self._read(flight, slot) for slot in phase.inputs}
        except ReceiveOverflow as overflow:
            if not self._rounds:
                raise
            block = self._open_rounds(phase, flight, overflow)
        flight.state["routed"] = block.forward()
        self._clock.exchange_wait_s += block.take_wait_s()
        return None

    def _open_rounds(self, phase: Compute, flight: Flight, overflow: ReceiveOverflow) -> BlockInRounds:
        """The routed part of the block to whose experts, `phase`, the rows were refused."""
        for slot in (*phase.inputs, *phase.outputs):
            flight.started.pop(slot, None)
            flight.state.pop(slot, None)
        tokens, weights, expert_ids = (
            flight.state[slot] for slot in ("ffn_in", "gate_weights", "expert_ids")
        )

        def experts(*rows: Tensor) -> Tensor:
            return phase.fn(*rows)[0]

        block = BlockInRounds(self._dispatcher, overflow, tokens, weights, expert_ids, experts)
        flight.in_rounds[phase.layer] = block
        return block

    def _dispatch(self, phase: Dispatch, flight: Flight, training: bool) -> None:
        tokens, weights, expert_ids = (self._read(flight, slot) for slot in phase.inputs)
        taped = _Taped()
        if training:
            self._count_experts(phase.layer, expert_ids)
            flight.tape[phase] = taped
        flight.token_shape = tokens.shape
        pending = self._dispatcher.dispatch(tokens.reshape(-1, tokens.shape[-1]), weights, expert_ids)

        def store(received: Received) -> None:
            taped.received = received
            values = (received.rows, received.row_weights, received.row_counts)
            flight.state.update(zip(phase.outputs, values, strict=True))
            flight.handles[phase.layer] = received.handle

        _start(flight, phase.outputs, _Started(pending, store))

    def _combine(self, phase: Combine, flight: Flight, training: bool) -> None:
        if phase.layer in flight.in_rounds:
            return
        rows = self._read(flight, "expert_out")
        shape = flight.token_shape
        pending = self._dispatcher.combine(rows, flight.handles[phase.layer])

        def store(tokens: Tensor) -> None:
            flight.state["routed"] = tokens.reshape(shape)

        _start(flight, phase.outputs, _Started(pending, store))

    def _read(self, flight: Flight, slot: str) -> Tensor:
        self._finish(flight, slot)
        return flight.state[slot]

    def _finish(self, flight: Flight, slot: str) -> None:
        begun = time.perf_counter()
        for started in flight.started.pop(slot, ()):
            started.finish()
        self._clock.exchange_wait_s += time.perf_counter() - begun

    # -- backward --------------------------------------------------------------------------------

    def backward_steps(self, flight: Flight, weights: ObjectiveWeights, *, weight_grads: str) -> list[Step]:
        """The backward of `flight` as steps to run in order.

        Args:
            flight: after its forward; `grads` holds the gradient of the chunk's output, if it has one.
            weights: derivatives of the objective.
            weight_grads: "now" with each phase; "spread": a step of their own after each phase;
                "later": left in `flight.weight_grads` for a W action.
        """
        assert weight_grads in ("now", "spread", "later"), weight_grads
        steps: list[Step] = []
        for phase in _backward_order(self.phases):
            run = self._backward_step(phase, flight, weights, weight_grads)
            steps.append(Step(f"{phase.name}_b", phase.layer, run))
            if weight_grads == "spread" and isinstance(phase, Compute):
                steps.append(
                    Step(f"{phase.name}_w", phase.layer, lambda: run_weight_grads(flight.weight_grads))
                )
        return steps

    def _backward_step(
        self, phase: Phase, flight: Flight, weights: ObjectiveWeights, weight_grads: str
    ) -> Callable[[], None]:
        if isinstance(phase, Dispatch):
            return lambda: self._dispatch_backward(phase, flight)
        if isinstance(phase, Combine):
            return lambda: self._combine_backward(phase, flight)
        into = None if weight_grads == "now" else flight.weight_grads
        return lambda: self._compute_backward(phase, flight, weights, into)

    def _compute_backward(
        self, phase: Compute, flight: Flight, weights: ObjectiveWeights, into: WeightGrads | None
    ) -> None:
        if phase.name == "experts" and phase.layer in flight.in_rounds:
            self._backward_in_rounds(flight, flight.in_rounds[phase.layer])
            return
        taped = flight.tape.pop(phase)
        outputs, grads = [], []
        for slot, output in taped.outputs.items():
            grad = output.new_tensor(weights.of(slot)) if slot in SCALARS else self._take_grad(flight, slot)
            if grad is not None:
                outputs.append(output)
                grads.append(grad.reshape(output.shape))
        if outputs:
            with self._sink.collect(into):
                torch.autograd.backward(outputs, grads)
        for slot, value in taped.inputs.items():
            if value.grad is not None:
                flight.add_grad(slot, value.grad)

    def _backward_in_rounds(self, flight: Flight, block: BlockInRounds) -> None:
        with self._sink.collect(None):
            d_tokens, d_weights = block.backward()
        self._clock.exchange_wait_s += block.take_wait_s()
        flight.add_grad("ffn_in", d_tokens)
        flight.add_grad("gate_weights", d_weights)

    def _combine_backward(self, phase: Combine, flight: Flight) -> None:
        grad = self._take_grad(flight, "routed")
        assert grad is not None, f"{phase.layer}: nothing used what the experts put out"
        if phase.layer in flight.in_rounds:
            flight.in_rounds[phase.layer].keep_gradient(grad)
            return
        grad = grad.reshape(-1, grad.shape[-1])
        pending = self._dispatcher.combine_backward(grad, flight.handles[phase.layer])
        _start(flight, ("expert_out",), _Started(pending, lambda rows: flight.add_grad("expert_out", rows)))

    def _dispatch_backward(self, phase: Dispatch, flight: Flight) -> None:
        received = flight.tape.pop(phase).received
        if flight.in_rounds.pop(phase.layer, None) is not None:
            return
        assert received is not None, f"{phase.layer}: backward before its forward ended"
        d_rows, d_weights = self._take_grad(flight, "rows"), self._take_grad(flight, "row_weights")
        pending = self._dispatcher.dispatch_backward(
            torch.zeros_like(received.rows) if d_rows is None else d_rows,
            torch.zeros_like(received.row_weights) if d_weights is None else d_weights,
            received.handle,
        )

        def store(grads: tuple[Tensor, Tensor]) -> None:
            flight.add_grad("ffn_in", grads[0].reshape(flight.token_shape))
            flight.add_grad("gate_weights", grads[1])

        _start(flight, ("ffn_in", "gate_weights"), _Started(pending, store))

    def _take_grad(self, flight: Flight, slot: str) -> Tensor | None:
        self._finish(flight, slot)
        return flight.grads.pop(slot, None)


def _start(flight: Flight, slots: Sequence[str], started: _Started) -> None:
    for slot in slots:
        flight.started.setdefault(slot, []).append(started)


def _backward_order(phases: Sequence[Phase]) -> list[Phase]:
    """Reversed, but the shared expert before the routed ones: it fills the wait for their gradients."""
    order: list[Phase] = []
    for phase in reversed(phases):
        follows_experts = phase.name == "shared" and order and order[-1].name == "experts"
        order.insert(len(order) - 1 if follows_experts else len(order), phase)
    return order


def _cut(value: Tensor) -> Tensor:
    """A leaf with the same values; floating ones collect a gradient."""
    value = value.detach()
    return value.requires_grad_() if value.is_floating_point() else value
