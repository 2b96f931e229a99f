"""What the actions of a run's program cost on a cluster: `Costs` for the simulator, in seconds.

A forward alone runs its phases in order, the shared expert under dispatch; a backward alone and an overlapped
pair are the merged lists of `schedule.interleave`, as the executor runs them. So what of an exchange stays in
sight is not assumed but follows, block by block, from who waits for what (`two_lanes`).
"""

from collections.abc import Callable, Hashable, Iterable

from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.parts import StageParts, stage_parts
from moe_runtime.planner.reckon.stage_steps import Piece, StageClock, backward_steps, forward_steps
from moe_runtime.planner.reckon.two_lanes import Flown, TimedStep, fly
from moe_runtime.schedule.action import Kind, Overlap, Program
from moe_runtime.schedule.interleave import interleave


class Timed:
    """What has been timed already, by what stages hold.

    Layouts share it that differ in nothing but how stages are cut and placed: of one model, cluster and
    world, ep, size of a microbatch and recompute.
    """

    def __init__(self, machine: Machine, imbalance: float = 1.0) -> None:
        self._clock = StageClock(machine, imbalance)
        self._pieces: dict[StageParts, list[Piece]] = {}
        self._flown: dict[Hashable, Flown] = {}

    def pieces(self, parts: StageParts) -> list[Piece]:
        """The phases of a stage."""
        if parts not in self._pieces:
            self._pieces[parts] = self._clock.pieces(parts)
        return self._pieces[parts]

    def flown(self, key: Hashable, steps: Callable[[], list[TimedStep]], pair: bool = False) -> Flown:
        """What a list of steps comes to; `key` says which.

        Args:
            pair: exchanges hold their multiprocessors all along, if there are any.
        """
        if key not in self._flown:
            made = steps()
            held = pair and any(step.is_exchange and step.alone for step in made)
            self._flown[key] = fly(made, held=held)
        return self._flown[key]


class StageTimes:
    """Times of the stages of a run.

    Args:
        machine: the run on its cluster.
        imbalance: rows that the fullest rank's experts get, over the mean.
        timed: of a layout that shares its times with this one; None: nothing has been timed.
    """

    def __init__(self, machine: Machine, imbalance: float = 1.0, timed: Timed | None = None) -> None:
        self.machine = machine
        self._timed = timed or Timed(machine, imbalance)
        self._parts = stage_parts(machine.config.model, machine.layout)
        self._pieces = [self._timed.pieces(one) for one in self._parts]

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
        return self._timed.flown(("F", self._parts[stage]), lambda: forward_steps(self._pieces[stage]))

    def backward(self, stage: int, weight_grads: bool = True) -> Flown:
        """A backward alone, with its weight gradients or without."""
        overlaps = self.machine.config.layout.overlap and weight_grads

        def steps() -> list[TimedStep]:
            found = backward_steps(self._pieces[stage], weight_grads)
            return interleave((), found) if overlaps else found

        return self._timed.flown(("B" if weight_grads else "I", self._parts[stage]), steps)

    def pair(self, ahead: int, back: int) -> Flown:
        """An overlapped pair: the forward of one stage, the backward of another."""
        key = ("F&B", self._parts[ahead], self._parts[back])
        return self._timed.flown(key, lambda: merge(self._pieces[ahead], self._pieces[back]), pair=True)


def merge(ahead: list[Piece], back: list[Piece]) -> list[TimedStep]:
    """The list of a pair."""
    return interleave(forward_steps(ahead), backward_steps(back, weight_grads=True))


def _pairs_of(program: Program) -> set[tuple[int, int]]:
    entries: Iterable[object] = (entry for row in program.rows for entry in row)
    return {(one.forward.stage, one.backward.stage) for one in entries if isinstance(one, Overlap)}
