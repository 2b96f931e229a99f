"""What one rank can be judged by alone: order within its row, and the memory the row holds.

A walk along the row with what the rank has: tapes of forwards, gradients owed, tensors made, receives
posted. An entry may use only what earlier entries left there, so the two halves of an overlap can not
feed each other.
"""

from dataclasses import dataclass, field

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Kind, Program, actions_of, where
from moe_runtime.schedule.products import Product, carried_by, holder_of, made_by, needed_by

_Key = tuple[int, int, int]


@dataclass(slots=True)
class Peaks:
    """Most of each thing alive at once on one rank."""

    live: int = 0
    pending: int = 0
    posted: int = 0


@dataclass(slots=True)
class _Holdings:
    """What the rank holds at some point of its row."""

    tapes: set[_Key] = field(default_factory=set)  # forwards done, backward to come
    owed: set[_Key] = field(default_factory=set)  # I done, W to come
    made: set[Product] = field(default_factory=set)
    posted: set[Product] = field(default_factory=set)  # receives not used yet

    def raise_peaks(self, peaks: Peaks) -> None:
        peaks.live = max(peaks.live, len(self.tapes) + len(self.owed))
        peaks.pending = max(peaks.pending, len(self.owed))
        peaks.posted = max(peaks.posted, len(self.posted))


def walk_row(program: Program, rank: int, lowered: bool) -> Peaks:
    """Check the order of one rank's row.

    Args:
        lowered: whether transfers have been added, so that other ranks' tensors come by receives only.

    Returns:
        its peaks; an activation lives from its F to its B or W, both halves of an overlap at once.

    Raises:
        ScheduleError: an entry uses what is not there yet; names rank, entry and action.
    """
    holdings, peaks = _Holdings(), Peaks()
    for position, entry in enumerate(program.rows[rank]):
        actions = actions_of(entry)
        for action in actions:
            problem = _problem(program, rank, action, holdings, lowered)
            if problem is not None:
                raise ScheduleError(f"{where(rank, position, entry)}: {problem}")
        for action in actions:
            _begin(program, action, holdings)
        holdings.raise_peaks(peaks)
        for action in actions:
            _end(action, holdings)
    return peaks


def _problem(program: Program, rank: int, action: Action, holdings: _Holdings, lowered: bool) -> str | None:
    """Why the rank cannot do this action now, by what it did before; None if it can."""
    key = (action.direction, action.stage, action.microbatch)
    if action.kind.is_transfer:
        product = carried_by(action)
        early = action.kind.is_send and product not in holdings.made
        return f"{action} sends {product} before it is made" if early else None
    if action.kind is Kind.WEIGHT_GRAD:
        return None if key in holdings.owed else f"{action} comes before its I"
    if action.kind is not Kind.FORWARD and key not in holdings.tapes:
        return f"{action} comes before its F"
    need = needed_by(action, program.num_stages)
    if need is None:
        return None
    if holder_of(program, need) == rank:
        return None if need in holdings.made else f"{action} comes before {need} is made here"
    unposted = lowered and need not in holdings.posted
    return f"{action} comes before the receive of {need} is posted" if unposted else None


def _begin(program: Program, action: Action, holdings: _Holdings) -> None:
    """What an action takes and holds while it runs."""
    if action.kind is Kind.FORWARD:
        holdings.tapes.add((action.direction, action.stage, action.microbatch))
    elif action.kind.is_transfer and not action.kind.is_send:
        holdings.posted.add(carried_by(action))
    need = None if action.kind.is_transfer else needed_by(action, program.num_stages)
    if need is not None:
        holdings.posted.discard(need)


def _end(action: Action, holdings: _Holdings) -> None:
    """What an action leaves and frees when it is done."""
    key = (action.direction, action.stage, action.microbatch)
    if action.kind in (Kind.BACKWARD, Kind.INPUT_GRAD):
        holdings.tapes.discard(key)
    if action.kind is Kind.INPUT_GRAD:
        holdings.owed.add(key)
    elif action.kind is Kind.WEIGHT_GRAD:
        holdings.owed.discard(key)
    product = made_by(action)
    if product is not None:
        holdings.made.add(product)
