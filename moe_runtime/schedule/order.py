"""What one rank can be judged by alone: order within its row, and the memory the row holds.

A walk along the row with what the rank has: tapes of forwards, gradients owed, tensors made, receives
posted. An entry may use only what earlier entries left there, so the two halves of an overlap can not
feed each other.
"""

from dataclasses import dataclass, field

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Kind, Program, actions_of, where
from moe_runtime.schedule.neighbours import Neighbours, OtherRanks, neighbours_of
from moe_runtime.schedule.products import carried_by, needed_by

_Key = tuple[int, ...]  # stage, microbatch, direction


@dataclass(slots=True)
class Peaks:
    """Most of each thing alive at once on one rank."""

    live: int = 0
    pending: int = 0
    posted: int = 0


def walk_row(program: Program, rank: int, lowered: bool, neighbours: Neighbours | None = None) -> Peaks:
    """Check the order of one rank's row.

    Args:
        lowered: whether transfers have been added, so that other ranks' tensors come by receives only.
        neighbours: the program's, if they are at hand.

    Returns:
        its peaks; an activation lives from its F to its B or W, both halves of an overlap at once.

    Raises:
        ScheduleError: an entry uses what is not there yet; names rank, entry and action.
    """
    holdings = _Holdings(program.num_stages, lowered, neighbours or neighbours_of(program))
    for position, entry in enumerate(program.rows[rank]):
        actions = actions_of(entry)
        for action in actions:
            problem = holdings.problem(action)
            if problem is not None:
                raise ScheduleError(f"{where(rank, position, entry)}: {problem}")
        for action in actions:  # an overlap's forward first, while its backward's tape is still there
            holdings.do(action)
    return holdings.peaks


@dataclass(slots=True)
class _Holdings:
    """What the rank holds at some point of its row."""

    num_stages: int
    lowered: bool
    neighbours: Neighbours
    peaks: Peaks = field(default_factory=Peaks)
    tapes: set[_Key] = field(default_factory=set)  # forwards done, backward to come
    owed: set[_Key] = field(default_factory=set)  # I done, W to come
    activations: set[_Key] = field(default_factory=set)  # made here
    gradients: set[_Key] = field(default_factory=set)  # made here
    posted_activations: set[_Key] = field(default_factory=set)  # receives not used yet
    posted_gradients: set[_Key] = field(default_factory=set)

    def problem(self, action: Action) -> str | None:
        """Why the rank cannot do this action now, by what it did before; None if it can."""
        kind, key = action.kind, action[1:]
        if kind.is_transfer:
            made = self.gradients if kind.of_gradient else self.activations
            early = kind.is_send and key not in made
            return f"{action} sends {carried_by(action)} before it is made" if early else None
        if kind.makes_activation:
            return self._missing_input(action, key, self.neighbours.before, self.posted_activations)
        if not kind.makes_gradient:
            return None if key in self.owed else f"{action} comes before its I"
        if key not in self.tapes:
            return f"{action} comes before its F"
        return self._missing_input(action, key, self.neighbours.after, self.posted_gradients)

    def _missing_input(self, action: Action, key: _Key, sources: OtherRanks, posted: set[_Key]) -> str | None:
        """Why what a neighbour stage makes is not at hand; None if it is."""
        if sources[action.direction][action.stage] is not None:  # on another rank
            if key in posted or not self.lowered:
                return None
            return f"{action} comes before the receive of {needed_by(action, self.num_stages)} is posted"
        need = needed_by(action, self.num_stages)
        if need is None:
            return None
        made = self.gradients if need.is_gradient else self.activations
        return None if need[1:] in made else f"{action} comes before {need} is made here"

    def do(self, action: Action) -> None:
        """Take what the action takes, leave what it leaves, and count at each moment of most."""
        kind, key = action.kind, action[1:]
        if kind.is_transfer:
            if not kind.is_send:
                self._post(key, self.posted_gradients if kind.of_gradient else self.posted_activations)
        elif kind.makes_activation:
            self.posted_activations.discard(key)
            self.activations.add(key)
            self.tapes.add(key)
            self.peaks.live = max(self.peaks.live, len(self.tapes) + len(self.owed))
        elif kind.makes_gradient:
            self.posted_gradients.discard(key)
            self.gradients.add(key)
            self.tapes.discard(key)
            if kind is Kind.INPUT_GRAD:
                self.owed.add(key)
                self.peaks.pending = max(self.peaks.pending, len(self.owed))
        else:
            self.owed.discard(key)

    def _post(self, key: _Key, posted: set[_Key]) -> None:
        posted.add(key)
        num_posted = len(self.posted_activations) + len(self.posted_gradients)
        self.peaks.posted = max(self.peaks.posted, num_posted)
