"""How the builders write a row down: lanes that count, and a row that remembers what it owes.

A *lane* is one stage of one direction as its rank sees it. Its forwards and its backwards both run
through the microbatches in ascending order, in every schedule, so that a recipe only has to say which
lane is next: the microbatch follows. (So every schedule also sums gradients in the same order.)
"""

from collections import deque
from dataclasses import dataclass, field

from moe_runtime.schedule.action import Action, Entry, Kind, Overlap


@dataclass(slots=True)
class Lane:
    """A stage, and how many microbatches have gone through it."""

    stage: int
    direction: int = 0
    forwards: int = 0
    backwards: int = 0

    def next_forward(self) -> Action:
        self.forwards += 1
        return Action(Kind.FORWARD, self.stage, self.forwards - 1, self.direction)

    def next_backward(self, kind: Kind = Kind.BACKWARD) -> Action:
        self.backwards += 1
        return Action(kind, self.stage, self.backwards - 1, self.direction)


@dataclass(slots=True)
class Row:
    """One rank's entries as they are written down."""

    entries: list[Entry] = field(default_factory=list)
    owed: deque[Action] = field(default_factory=deque)  # the W of every I so far, oldest first

    def forward(self, lane: Lane) -> None:
        self.entries.append(lane.next_forward())

    def backward(self, lane: Lane) -> None:
        self.entries.append(lane.next_backward())

    def input_grad(self, lane: Lane) -> None:
        action = lane.next_backward(Kind.INPUT_GRAD)
        self.entries.append(action)
        self.owed.append(Action(Kind.WEIGHT_GRAD, action.stage, action.microbatch, action.direction))

    def weight_grad(self) -> None:
        """The W of the oldest I that still owes one."""
        self.entries.append(self.owed.popleft())

    def overlap(self, forward: Lane, backward: Lane) -> None:
        self.entries.append(Overlap(forward.next_forward(), backward.next_backward()))

    def up_to(self, num_microbatches: int) -> tuple[Entry, ...]:
        """The entries whose microbatch is one of the first `num_microbatches`; no overlaps among them.

        A schedule that wants at least so many microbatches is written for them, and those beyond the
        last real one are left out. Nothing real waits for them, and the order of the rest is a part of
        an order that ends; so the shorter program ends too, with no more alive at once.
        """
        entries = (entry for entry in self.entries if isinstance(entry, Action))
        return tuple(entry for entry in entries if entry.microbatch < num_microbatches)
