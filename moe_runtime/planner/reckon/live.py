"""The fullest moment of a pipeline rank: its row of the program, walked with bytes.

A microbatch in a stage holds `whole` from its F to the end of its B or I, and `owed` from there to its W.
Both halves of an overlap are there at once. Stages differ, so it is bytes that are added up and not
microbatches: the moment of most microbatches need not be the fullest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_runtime.planner.reckon.kept import Live
from moe_runtime.schedule.action import Action, Entry, Kind, Program, actions_of, is_transfer
from moe_runtime.schedule.neighbours import neighbours_of


@dataclass(frozen=True)
class Fullest:
    """The fullest moment.

    Args:
        nbytes: of activations.
        microbatches: then alive, by stage, those that only wait for W not counted.
        waiting: those, by stage.
        boundary: most tensors at a time that have arrived early or are leaving.
    """

    nbytes: float
    microbatches: dict[int, int]
    waiting: dict[int, int]
    boundary: int


def fullest(program: Program, rank: int, stages: Sequence[Live]) -> Fullest:
    """Walk the row of `rank`.

    Args:
        stages: bytes of one microbatch in each stage of the program.
    """
    walk = _Walk(stages)
    row = [entry for entry in program.rows[rank] if not is_transfer(entry)]
    for entry in row:
        actions = actions_of(entry)
        for action in actions:
            walk.begin(action)
        for action in actions:
            walk.end(action)
    return Fullest(walk.peak, walk.at_peak, walk.waiting_at_peak, _boundary(program, row))


class _Walk:
    def __init__(self, stages: Sequence[Live]) -> None:
        self.stages = stages
        self.now = self.peak = 0.0
        self.alive: dict[int, int] = {}
        self.waiting: dict[int, int] = {}
        self.at_peak: dict[int, int] = {}
        self.waiting_at_peak: dict[int, int] = {}

    def begin(self, action: Action) -> None:
        """What an action needs to be there besides what is."""
        if action.kind is Kind.FORWARD:
            self._change(self.alive, action.stage, 1, self.stages[action.stage].whole)

    def end(self, action: Action) -> None:
        """What an action leaves."""
        kind, stage = action.kind, action.stage
        if kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
            self._change(self.alive, stage, -1, -self.stages[stage].whole)
        if kind is Kind.INPUT_GRAD:
            self._change(self.waiting, stage, 1, self.stages[stage].owed)
        if kind is Kind.WEIGHT_GRAD:
            self._change(self.waiting, stage, -1, -self.stages[stage].owed)

    def _change(self, counts: dict[int, int], stage: int, by: int, nbytes: float) -> None:
        counts[stage] = counts.get(stage, 0) + by
        self.now += nbytes
        if self.now > self.peak:
            self.peak = self.now
            self.at_peak, self.waiting_at_peak = dict(self.alive), dict(self.waiting)


def _boundary(program: Program, row: Sequence[Entry]) -> int:
    """Tensors of this entry and the next that were received, and those of the last that are leaving."""
    neighbours = neighbours_of(program)
    needs = [len(neighbours.receives_for(entry)) for entry in row] + [0]
    leaves = [0] + [len(neighbours.sends_of(entry)) for entry in row]
    return max((needs[at] + needs[at + 1] + leaves[at] for at in range(len(row))), default=0)
