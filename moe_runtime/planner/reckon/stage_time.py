"""What the actions of a run's program cost on a cluster: `Costs` for the simulator, in seconds.

A forward alone runs its phases in order, the shared expert under dispatch; a backward alone and an overlapped
pair are the merged lists of `schedule.interleave`, as the executor runs them. So what of an exchange stays in
sight is not assumed but follows, block by block, from who waits for what (`two_lanes`).
"""

from collections.abc import Iterable

from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.parts import stage_parts
from moe_runtime.planner.reckon.stage_steps import Piece, StageClock, backward_steps, forward_steps
from moe_runtime.planner.reckon.two_lanes import Flown, TimedStep, fly
from moe_runtime.schedule.action import Kind, Overlap, Program
from moe_runtime.schedule.interleave import interleave


class StageTimes:
    """Times of the stages of a run.

    Args:
        machine: the run on its cluster.
        imbalance: rows that the fullest rank's experts get, over the mean.
    """

    def __init__(self, machine: Machine, imbalance: float = 1.0) -> None:
        self.machine = machine
        clock = StageClock(machine, imbalance)
        parts = stage_parts(machine.config.model, machine.layout)
        made = {one: clock.pieces(one) for one in dict.fromkeys(parts)}
        self._pieces = [made[one] for one in parts]
        self._parts = parts
        self._pairs: dict[object, Flown] = {}

    def costs(self, program: Program) -> Costs:
        """Costs of a program of this layout."""
        stages = range(len(self._pieces))
        met = _pairs_of(program)
        flown = {pair: self.pair(*pair) for pair in met}
        alone = {(Kind.FORWARD, stage): self.forward(stage).span for stage in stages}
        alone |= {(Kind.BACKWARD, stage): self.backward(stage).span for stage in stages}
        alone |= {(Kind.INPUT_GRAD, stage): self.backward(stage, False).span for stage in stages}
        return Costs(
            stages=tuple(self.stage(stage) for stage in stages),
            transfer=self.machine.transfer_s,
            pairs={pair: one.span for pair, one in flown.items()},
            pair_compute={pair: one.computing for pair, one in flown.items()},
            alone=alone,
        )

    def block(self) -> dict[str, Piece]:
        """The phases of one MoE block by label; empty for a model without."""
        found = [piece for pieces in self._pieces for piece in pieces]
        first = next((piece.layer for piece in found if piece.label == "dispatch"), None)
        return {piece.label: piece for piece in found if piece.layer == first and piece.label != "merge"}

    def stage(self, stage: int) -> StageCosts:
        """Computation and exchanges of a stage, each by itself; live in units of one pp-th of the model."""
        pieces = self._pieces[stage]
        computing = [piece for piece in pieces if not piece.is_exchange]
        flying = [piece for piece in pieces if piece.is_exchange]
        model, layout = self.machine.config.model, self.machine.layout
        return StageCosts(
            forward=sum(piece.forward[0] for piece in computing),
            input_grad=sum(piece.input_grad[0] for piece in computing),
            weight_grad=sum(piece.weight_grad[0] for piece in computing),
            forward_comm=sum(piece.forward[0] for piece in flying),
            backward_comm=sum(piece.input_grad[0] for piece in flying),
            live=len(layout.layers[stage]) * layout.pp / model.num_layers,
        )

    def forward(self, stage: int) -> Flown:
        """A forward alone."""
        return fly(forward_steps(self._pieces[stage]), held=False)

    def backward(self, stage: int, weight_grads: bool = True) -> Flown:
        """A backward alone, with its weight gradients or without."""
        steps = backward_steps(self._pieces[stage], weight_grads)
        overlaps = self.machine.config.layout.overlap and weight_grads
        return fly(interleave((), steps) if overlaps else steps, held=False)

    def pair(self, ahead: int, back: int) -> Flown:
        """An overlapped pair: the forward of one stage, the backward of another."""
        key = (self._parts[ahead], self._parts[back])
        if key not in self._pairs:
            merged = merge(self._pieces[ahead], self._pieces[back])
            self._pairs[key] = fly(merged, held=any(step.is_exchange and step.alone for step in merged))
        return self._pairs[key]


def merge(ahead: list[Piece], back: list[Piece]) -> list[TimedStep]:
    """The list of a pair."""
    return interleave(forward_steps(ahead), backward_steps(back, weight_grads=True))


def _pairs_of(program: Program) -> set[tuple[int, int]]:
    entries: Iterable[object] = (entry for row in program.rows for entry in row)
    return {(one.forward.stage, one.backward.stage) for one in entries if isinstance(one, Overlap)}
