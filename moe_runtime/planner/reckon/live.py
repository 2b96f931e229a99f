"""The fullest moment of a pipeline rank: its row of the program, walked with bytes.

A microbatch in a stage holds `whole` from its F to the end of its B or I, and `owed` from there to its W.
An overlap makes one microbatch's blocks while it lets go of another's, one by one, so that it needs one block
more than either, not all of both. Stages differ, so it is bytes that are added up and not microbatches: the
moment of most microbatches need not be the fullest one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

from moe_runtime.planner.reckon.kept import Live
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program, actions_of, is_transfer
from moe_runtime.schedule.neighbours import neighbours_of


@dataclass(frozen=True)
class Fullest:
    """The fullest moment.

    Args:
        nbytes: of activations, within an entry.
        between: of them after an entry, the most.
        microbatches: then alive, by stage, those that only wait for W not counted.
        waiting: those, by stage.
        received: most tensors of neighbour stages that are there, or on their way, before they are used.
        leaving: most that one entry sends.
    """

    nbytes: float
    between: float
    microbatches: dict[int, int]
    waiting: dict[int, int]
    received: int
    leaving: int


def fullest(program: Program, rank: int, stages: Sequence[Live]) -> Fullest:
    """Walk the row of `rank`.

    Args:
        stages: bytes of one microbatch in each stage of the program.
    """
    walk = _Walk(stages)
    row = [entry for entry in program.rows[rank] if not is_transfer(entry)]
    for entry in row:
        walk.enter(entry)
    received, leaving = boundary_tensors(program, program.rows[rank])
    return Fullest(walk.peak, walk.between, walk.at_peak, walk.waiting_at_peak, received, leaving)


class _Walk:
    def __init__(self, stages: Sequence[Live]) -> None:
        self.stages = stages
        self.now = self.peak = self.between = 0.0
        self.alive: dict[int, int] = {}
        self.waiting: dict[int, int] = {}
        self.at_peak: dict[int, int] = {}
        self.waiting_at_peak: dict[int, int] = {}

    def enter(self, entry: Entry) -> None:
        """What is there within an entry, and after it."""
        inside = self.now
        if isinstance(entry, Overlap):
            inside += rise(self.stages[entry.forward.stage].parts, self.stages[entry.backward.stage].parts)
        elif entry.kind is Kind.FORWARD:
            inside += self.stages[entry.stage].whole
        counts = dict(self.alive), dict(self.waiting)
        for action in actions_of(entry):
            self._do(action)
        self.between = max(self.between, self.now)
        if max(inside, self.now) > self.peak:
            self.peak = max(inside, self.now)
            now = self.alive, self.waiting
            self.at_peak, self.waiting_at_peak = map(_largest, counts, now)

    def _do(self, action: Action) -> None:
        kind, stage = action.kind, action.stage
        whole, owed = self.stages[stage].whole, self.stages[stage].owed
        if kind is Kind.FORWARD:
            self._change(self.alive, stage, 1, whole)
        elif kind is Kind.BACKWARD:
            self._change(self.alive, stage, -1, -whole)
        elif kind is Kind.INPUT_GRAD:
            self._change(self.alive, stage, -1, -whole)
            self._change(self.waiting, stage, 1, owed)
        elif kind is Kind.WEIGHT_GRAD:
            self._change(self.waiting, stage, -1, -owed)

    def _change(self, counts: dict[int, int], stage: int, by: int, nbytes: float) -> None:
        counts[stage] = counts.get(stage, 0) + by
        self.now += nbytes


def rise(forward: Sequence[float], backward: Sequence[float]) -> float:
    """The most that an overlap adds: a forward's k-th block beside the backward's k-th from its end."""
    most = now = 0.0
    for made, freed in zip_longest(forward, reversed(backward), fillvalue=0.0):
        most = max(most, now + made)
        now += made - freed
    return most


def _largest(before: dict[int, int], after: dict[int, int]) -> dict[int, int]:
    """Of each stage, as an entry has both what was and what it makes."""
    return {stage: max(before.get(stage, 0), after[stage]) for stage in sorted(after)}


def boundary_tensors(program: Program, row: Sequence[Entry]) -> tuple[int, int]:
    """The most tensors that are received early, and that one entry sends.

    Args:
        row: of the program; without transfers, receives count as if posted one entry ahead.
    """
    neighbours = neighbours_of(program)
    needs = [0 if is_transfer(entry) else len(neighbours.receives_for(entry)) for entry in row]
    leaving = max((len(neighbours.sends_of(entry)) for entry in row if not is_transfer(entry)), default=0)
    if not any(map(is_transfer, row)):
        return max((one + following for one, following in pairwise([*needs, 0])), default=0), leaving
    posted = most = 0
    for entry, used in zip(row, needs, strict=True):
        receives = isinstance(entry, Action) and entry.kind.is_transfer and not entry.kind.is_send
        posted += receives - used
        most = max(most, posted)
    return most, leaving
