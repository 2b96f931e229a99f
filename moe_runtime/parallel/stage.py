"""Runs one stage of the model, forwards and backwards, phase by phase, with a tape of its own.

Why not let autograd run the whole backward: a pipeline stage must be able to stop between phases, so
that another microbatch's phase runs while this one's tokens travel. So the graph is cut at every phase
(`flight.py`). Dispatch and combine are not autograd at all: each starts, and is waited for by the first
phase that reads what it brings; their backwards are each other.

What a phase writes is dropped after the last phase that reads it, so that between forward and backward
nothing is alive but what a backward needs.

Rejected: one coroutine or thread per half of an overlapped pair (needs a barrier that can hang, and
an exception in a thread is lost); hooks inside one autograd graph (the engine's order is not ours).

A forward or backward is handed out as a list of `Step`s, which the caller runs in order, possibly
merged with another list (`schedule.interleave`). Values live in a `Flight`, one per microbatch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from moe_comm.dispatcher import Dispatcher, Pending, Received
from moe_comm.errors import ReceiveOverflow
from moe_comm.wire.carried import carry_over
from torch import Tensor

from moe_runtime.model.phase import BALANCE, LOSS, LOSS_MTP, SCALARS, Combine, Compute, Dispatch, Phase
from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.flight import Exit, Flight, Landed, Started, Taped, let_in
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
    """Derivative of the objective with respect to each scalar that a phase puts out.

    Args:
        factors: by the name of a head, positions over targets of the global batch (`model.targets`); 1 for
            a head that is not there.
    """

    loss: float
    loss_mtp: float
    balance: float
    factors: Mapping[str, float] = field(default_factory=dict)

    def of(self, slot: str, layer: str) -> float:
        weight = {LOSS: self.loss, LOSS_MTP: self.loss_mtp, BALANCE: self.balance}[slot]
        return weight * self.factor(layer)

    def factor(self, layer: str) -> float:
        """What makes the loss of a layer's phase a mean over targets."""
        return self.factors.get(layer, 1.0)


class StageRunner:
    """Runs the phases of one chunk.

    Args:
        phases: the chunk's phases, in forward order.
        dispatcher: moves tokens to experts and back.
        sink: receives the weight gradients of the chunk's parameters.
        count_experts: called in training forwards with (layer, expert_ids int64 [tokens, top_k]).
        clock: where waiting times are added.
        rounds: run a block whose rows do not fit in rounds; else that ends the step with an error.
        waits_at_once: hide no exchange under anything; not where blocks may go in rounds.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        dispatcher: Dispatcher,
        sink: WeightGradSink,
        count_experts: Callable[[str, Tensor], None],
        clock: Clock,
        rounds: bool = False,
        waits_at_once: bool = False,
    ) -> None:
        self.phases = tuple(phases)
        self._dies_after = _last_readers(self.phases, rounds)
        self._dispatcher = dispatcher
        self._sink = sink
        self._count_experts = count_experts
        self._clock = clock
        self._rounds = rounds
        self._waits_at_once = waits_at_once and not rounds

    # -- forward ---------------------------------------------------------------------------------

    def forward_steps(self, flight: Flight, *, training: bool) -> list[Step]:
        """The forward of `flight`, whose `state` holds the chunk's inputs, as steps to run in order."""
        return [
            Step(phase.name, phase.layer, self._forward_step(phase, flight, training))
            for phase in self.phases
        ]

    def _forward_step(self, phase: Phase, flight: Flight, training: bool) -> Callable[[], None]:
        def run() -> None:
            if isinstance(phase, Dispatch):
                self._dispatch(phase, flight, training)
            elif isinstance(phase, Combine):
                self._combine(phase, flight)
            else:
                self._compute(phase, flight, training)
            for slot in self._dies_after[phase]:
                flight.state.pop(slot, None)

        return run

    def _compute(self, phase: Compute, flight: Flight, training: bool) -> None:
        values = self._inputs(phase, flight)
        if values is None:
            return
        taped = Taped()
        if training:
            values = let_in(values, taped)
            flight.tape[phase] = taped
        with torch.set_grad_enabled(training):
            results = phase.fn(*values.values())
        for slot, result in zip(phase.outputs, results, strict=True):
            if training and result.requires_grad:
                taped.exits[slot] = Exit.of(result)
            if slot in SCALARS:
                flight.scalars.append((slot, phase.layer, result.detach()))
            else:
                flight.state[slot] = carry_over(result, result.detach())

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
        if training:
            self._count_experts(phase.layer, expert_ids)
        flight.token_shape = tokens.shape
        lines = carry_over(tokens, tokens.reshape(-1, tokens.shape[-1]))
        pending = self._dispatcher.dispatch(lines, weights, expert_ids)

        def store(received: Received) -> None:
            rows, weights = received.rows, received.row_weights
            flight.state.update(zip(phase.outputs, (rows, weights, received.row_counts), strict=True))
            flight.landed[phase.layer] = Landed(
                received.handle, rows.shape, rows.dtype, weights.dtype, rows.device
            )

        self._start(flight, phase, phase.outputs, pending, store)

    def _combine(self, phase: Combine, flight: Flight) -> None:
        if phase.layer in flight.in_rounds:
            return
        rows = self._read(flight, "expert_out")
        shape = flight.token_shape
        pending = self._dispatcher.combine(rows, flight.landed[phase.layer].handle)

        def store(tokens: Tensor) -> None:
            flight.state["routed"] = tokens.reshape(shape)

        self._start(flight, phase, phase.outputs, pending, store)

    def _start(
        self,
        flight: Flight,
        phase: Phase,
        slots: Sequence[str],
        pending: Pending[Any],
        store: Callable[[Any], None],
        suffix: str = "",
    ) -> None:
        """Note a communication under way; whoever first needs one of `slots` waits for it."""
        wait = self._clock.watch(f"{phase.name}{suffix} {phase.layer}", pending.wait)
        started = Started(wait, store)
        for slot in slots:
            flight.started.setdefault(slot, []).append(started)
        if self._waits_at_once:
            started.finish()

    def _read(self, flight: Flight, slot: str) -> Tensor:
        self._finish(flight, slot)
        return flight.state[slot]

    def _finish(self, flight: Flight, slot: str) -> None:
        for started in flight.started.pop(slot, ()):
            started.finish()

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
        edges, grads = [], []
        for slot, exit in taped.exits.items():
            grad = self._grad_of(flight, (slot, phase.layer), exit, weights)
            if grad is not None:
                edges.append(exit.edge)
                grads.append(grad)
        if edges:
            with self._sink.collect(into):
                torch.autograd.backward(edges, grads)
        for slot, grad in taped.grads.items():
            flight.add_grad(slot, grad)
        # What is kept for W has a history that ends at this dictionary, and would keep the gradients too.
        taped.grads.clear()

    def _grad_of(
        self, flight: Flight, place: tuple[str, str], exit: Exit, weights: ObjectiveWeights
    ) -> Tensor | None:
        slot, layer = place
        if slot in SCALARS:
            # Filled there: a number copied to a GPU would have the host wait for it.
            return torch.full((), weights.of(slot, layer), dtype=exit.dtype, device=exit.device)
        grad = self._take_grad(flight, slot)
        return None if grad is None else carry_over(grad, grad.reshape(exit.shape))

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
        pending = self._dispatcher.combine_backward(grad, flight.landed[phase.layer].handle)

        def store(rows: Tensor) -> None:
            flight.add_grad("expert_out", rows)

        self._start(flight, phase, ("expert_out",), pending, store, "_b")

    def _dispatch_backward(self, phase: Dispatch, flight: Flight) -> None:
        if flight.in_rounds.pop(phase.layer, None) is not None:
            return
        landed = flight.landed.pop(phase.layer)
        d_rows, d_weights = self._take_grad(flight, "rows"), self._take_grad(flight, "row_weights")
        if d_rows is None:
            d_rows = torch.zeros(landed.rows_shape, dtype=landed.rows_dtype, device=landed.device)
        if d_weights is None:
            d_weights = torch.zeros(landed.rows_shape[0], dtype=landed.weights_dtype, device=landed.device)
        pending = self._dispatcher.dispatch_backward(d_rows, d_weights, landed.handle)

        def store(grads: tuple[Tensor, Tensor]) -> None:
            flight.add_grad("ffn_in", grads[0].reshape(flight.token_shape))
            flight.add_grad("gate_weights", grads[1])

        self._start(flight, phase, ("ffn_in", "gate_weights"), pending, store, "_b")

    def _take_grad(self, flight: Flight, slot: str) -> Tensor | None:
        self._finish(flight, slot)
        return flight.grads.pop(slot, None)


def _last_readers(phases: Sequence[Phase], rounds: bool) -> dict[Phase, tuple[str, ...]]:
    """Which slots nobody reads after each phase; what the last phase writes is the caller's.

    Args:
        rounds: experts may have to read the inputs of their dispatch again.
    """
    dies: dict[Phase, tuple[str, ...]] = {}
    needed = set(phases[-1].outputs)
    for phase in reversed(phases):
        reads = set(phase.inputs)
        if rounds and phase.name == "experts":
            reads |= set(Dispatch.inputs)
        dies[phase] = tuple(sorted((reads | set(phase.outputs)) - needed))
        needed = (needed - set(phase.outputs)) | reads
    return dies


def _backward_order(phases: Sequence[Phase]) -> list[Phase]:
    """Reversed, but the shared expert before the routed ones: it fills the wait for their gradients."""
    order: list[Phase] = []
    for phase in reversed(phases):
        follows_experts = phase.name == "shared" and order and order[-1].name == "experts"
        order.insert(len(order) - 1 if follows_experts else len(order), phase)
    return order
