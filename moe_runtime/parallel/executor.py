"""Walks one pipeline rank's row of a program and does what it says.

A table maps each kind of action to a method; an overlap runs the merged steps of its two halves.
Receives are posted where the program says and waited for by the action that reads them; what is sent
is let go as soon as it has left. Between two stages on the same rank (the turn of a V) a tensor is handed
over. A failure names rank, position, action and phase: with data from other ranks in flight that is the
only way to find it again.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.flight import Flight
from moe_runtime.parallel.p2p import Departures, Transfer, Transport, wait_for
from moe_runtime.parallel.stage import BOUNDARY, ObjectiveWeights, StageRunner, Step
from moe_runtime.parallel.weight_grad import run_weight_grads
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program
from moe_runtime.schedule.interleave import interleave

Key = tuple[int, int, int]  # direction, stage, microbatch
# (direction, microbatch), slot, value, and what makes it a mean over targets
Recorded = tuple[tuple[int, int], str, Tensor, float]


class ActionFailed(RuntimeError):
    """An action raised; the message says which, the cause says what."""


@dataclass
class StepScalars:
    """Sums over this rank's microbatches of what its stages put out.

    Args:
        totals: slot -> sum over microbatches (and, for the balance loss, layers).
        per_microbatch: (direction, microbatch) -> slot -> value, for comparisons.
        kept: (direction, microbatch) -> the slot that the caller asked for, where the last stage ran.
    """

    totals: dict[str, float] = field(default_factory=dict)
    per_microbatch: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    kept: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class Executor:
    """Runs programs on one pipeline rank.

    Args:
        pp_rank: this pipeline rank.
        stages: (direction, stage) -> runner of the chunk that is held here.
        transport: to the other pipeline ranks of this lane; None for a pipeline of one rank.
        boundary_dtype: dtype of the residual stream between stages.
        hidden_size: width of the residual stream.
        device: where boundary tensors live.
        clock: told what is done and waited for.
        extra_tokens: tokens of a sequence beyond seq_len (1 + mtp_depth).
        needs_tokens: every stage reads the tokens (a document mask), not only first and last.
        overlap: let exchanges fly under computation, of a pair and of a backward's own weight gradients.
    """

    def __init__(
        self,
        pp_rank: int,
        stages: dict[tuple[int, int], StageRunner],
        transport: Transport | None,
        *,
        boundary_dtype: torch.dtype,
        hidden_size: int,
        device: torch.device,
        clock: Clock,
        extra_tokens: int,
        needs_tokens: bool = False,
        overlap: bool = True,
    ) -> None:
        self._pp_rank = pp_rank
        self._stages = stages
        self._transport = transport
        self._dtype = boundary_dtype
        self._hidden_size = hidden_size
        self._device = device
        self._clock = clock
        self._departures = Departures(lambda name, posted: clock.ran("transfer", name, posted))
        self._needs_tokens = needs_tokens
        self._extra_tokens = extra_tokens
        self._overlaps = overlap
        self._do: dict[Kind, Callable[[Action], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.INPUT_GRAD: self._input_grad,
            Kind.WEIGHT_GRAD: self._weight_grad,
            Kind.SEND_ACT: self._send_activation,
            Kind.RECV_ACT: self._receive,
            Kind.SEND_GRAD: self._send_gradient,
            Kind.RECV_GRAD: self._receive,
        }

    def run(
        self,
        program: Program,
        tokens: Sequence[Sequence[Tensor]],
        weights: ObjectiveWeights | None,
        after_backward: Callable[[], None] | None = None,
        keep: str | None = None,
    ) -> StepScalars:
        """Run this rank's row.

        Args:
            program: with transfers; without backwards when `weights` is None.
            tokens: `tokens[direction][microbatch]`, int64 [sequences, seq_len + 1 + mtp_depth].
            weights: derivatives of the objective; None evaluates without a tape.
            after_backward: called after every B and every W (ZeRO 2 reduces there).
            keep: slot of the last stage to give back, such as `hidden`.

        Raises:
            ActionFailed: an action raised; every rank of the run must end.
        """
        self._clock.program_begins()
        self._program = program
        self._tokens = tokens
        self._weights = weights
        self._after_backward = after_backward
        self._keep = keep
        self._kept: dict[tuple[int, int], Tensor] = {}
        self._flights: dict[Key, Flight] = {}
        self._outputs: dict[Key, Tensor] = {}
        self._input_grads: dict[Key, Tensor] = {}
        self._arriving: dict[tuple[Kind, Key], tuple[Transfer, Tensor]] = {}
        self._recorded: list[Recorded] = []
        for position, entry in enumerate(program.rows[self._pp_rank]):
            try:
                self._enter(entry)
            except Exception as error:
                where = f"pipeline rank {self._pp_rank}, position {position}, {entry}"
                where += f", {self._clock.progress.part}" * bool(self._clock.progress.part)
                raise ActionFailed(f"{where}: {type(error).__name__}: {error}") from error
        self._drain()
        self._clock.program_ends()
        return _sum_up(self._recorded, self._kept)

    def _enter(self, entry: Entry) -> None:
        self._clock.progress.runs(str(entry))
        if isinstance(entry, Overlap):
            self._overlap(entry)
        else:
            self._do[entry.kind](entry)

    def _drain(self) -> None:
        """Wait for the sends; check that nothing is left over."""
        self._clock.progress.runs("the end of the program, where sends are waited for")
        begun = self._clock.wait_begins()
        self._departures.wait()
        self._clock.waited("transfer", begun)
        self._clock.progress.runs("")
        left = [*self._arriving, *self._outputs, *self._input_grads]
        assert not left, f"left over at the end of the step: {left}"

    # -- computation -----------------------------------------------------------------------------

    def _forward(self, action: Action) -> None:
        flight, steps = self._begin_forward(action)
        self._run(action, steps)
        self._end_forward(action, flight)

    def _backward(self, action: Action) -> None:
        flight, steps = self._begin_backward(action, "spread" if self._overlaps else "now")
        self._run(action, interleave((), steps) if self._overlaps else steps)
        self._end_backward(action, flight)

    def _input_grad(self, action: Action) -> None:
        flight, steps = self._begin_backward(action, "later")
        self._run(action, steps)
        self._end_backward(action, flight, keep=True)

    def _weight_grad(self, action: Action) -> None:
        begun = time.perf_counter()
        run_weight_grads(self._flights.pop(_key(action)).weight_grads)
        self._clock.took(action, begun)
        self._tell_gradients()

    def _overlap(self, pair: Overlap) -> None:
        ahead, forward_steps = self._begin_forward(pair.forward)
        back, backward_steps = self._begin_backward(pair.backward, "spread")
        self._run(pair, interleave(forward_steps, backward_steps))
        self._end_forward(pair.forward, ahead)
        self._end_backward(pair.backward, back)

    def _run(self, entry: Entry, steps: Sequence[Step]) -> None:
        clock, begun = self._clock, time.perf_counter()
        for step in steps:
            name = f"{step.label} {step.layer}"
            start = clock.progress.begins(name)
            step.run()
            clock.ran("phase", name, start)
        clock.took(entry, begun)

    def _begin_forward(self, action: Action) -> tuple[Flight, list[Step]]:
        tokens = self._tokens[action.direction][action.microbatch]
        is_first, is_last = action.stage == 0, action.stage == self._program.num_stages - 1
        state: dict[str, Tensor] = {}
        if is_first or is_last or self._needs_tokens:
            state["tokens"] = tokens
        if not is_first:
            state[BOUNDARY] = self._take_in(Kind.RECV_ACT, action, self._outputs)
        flight = Flight(state)
        self._clock.count_life(flight)
        runner = self._stages[action.direction, action.stage]
        return flight, runner.forward_steps(flight, training=self._weights is not None)

    def _end_forward(self, action: Action, flight: Flight) -> None:
        key = _key(action)
        if action.stage < self._program.num_stages - 1:
            self._outputs[key] = flight.state[BOUNDARY].contiguous()
        lane = (action.direction, action.microbatch)
        factors = self._weights.factors if self._weights is not None else {}
        self._recorded += [
            (lane, slot, value, factors.get(layer, 1.0)) for slot, layer, value in flight.scalars
        ]
        if self._keep is not None and self._keep in flight.state:
            self._kept[lane] = flight.state[self._keep]
        flight.state.clear()
        if self._weights is not None:
            self._flights[key] = flight

    def _begin_backward(self, action: Action, weight_grads: str) -> tuple[Flight, list[Step]]:
        assert self._weights is not None, "a backward in a program that is only evaluated"
        flight = self._flights[_key(action)]
        if action.stage < self._program.num_stages - 1:
            flight.grads[BOUNDARY] = self._take_in(Kind.RECV_GRAD, action, self._input_grads)
        runner = self._stages[action.direction, action.stage]
        return flight, runner.backward_steps(flight, self._weights, weight_grads=weight_grads)

    def _end_backward(self, action: Action, flight: Flight, keep: bool = False) -> None:
        key = _key(action)
        if action.stage > 0:
            self._input_grads[key] = flight.grads.pop(BOUNDARY).contiguous()
        flight.grads.clear()
        if keep:
            return
        del self._flights[key]
        self._tell_gradients()

    def _tell_gradients(self) -> None:
        """A backward is whole: its weight gradients are there, in it or by the W that followed."""
        if self._after_backward is not None:
            self._after_backward()

    # -- transfers -------------------------------------------------------------------------------

    def _send_activation(self, action: Action) -> None:
        self._send(action, self._outputs.pop(_key(action)))

    def _send_gradient(self, action: Action) -> None:
        self._send(action, self._input_grads.pop(_key(action)))

    def _send(self, action: Action, tensor: Tensor) -> None:
        assert self._transport is not None, "a transfer in a pipeline of one rank"
        transfer = self._transport.send(tensor, self._program.peer_of(action))
        self._departures.add(str(action), transfer, tensor)

    def _receive(self, action: Action) -> None:
        assert self._transport is not None, "a transfer in a pipeline of one rank"
        peer = self._program.peer_of(action)
        tokens = self._tokens[action.direction][action.microbatch]
        shape = (tokens.shape[0], tokens.shape[1] - self._extra_tokens, self._hidden_size)
        buffer = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._arriving[action.kind, _key(action)] = (self._transport.receive(buffer, peer), buffer)

    def _take_in(self, kind: Kind, action: Action, made_here: dict[Key, Tensor]) -> Tensor:
        """What the neighbour stage made: handed over if it is on this rank, else waited for."""
        neighbour = action.stage + (1 if kind is Kind.RECV_GRAD else -1)
        if self._program.placement[action.direction][neighbour] == self._pp_rank:
            return made_here.pop((action.direction, neighbour, action.microbatch))
        transfer, buffer = self._arriving.pop((kind, _key(action)))
        self._clock.progress.begins(f"waits for {action.stage}{kind.value}{action.microbatch}")
        begun = self._clock.wait_begins()
        wait_for(transfer)
        self._clock.waited("transfer", begun)
        return buffer


def _sum_up(recorded: Sequence[Recorded], kept: dict[tuple[int, int], Tensor]) -> StepScalars:
    """Read the scalars off the device, once, after the step."""
    scalars = StepScalars(kept=kept)
    for lane, slot, value, factor in recorded:
        number = float(value) * factor if factor else math.nan  # a mean over no targets
        own = scalars.per_microbatch.setdefault(lane, {})
        own[slot] = own.get(slot, 0.0) + number
        scalars.totals[slot] = scalars.totals.get(slot, 0.0) + number
    return scalars


def _key(action: Action) -> Key:
    return action.direction, action.stage, action.microbatch
