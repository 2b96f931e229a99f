"""DualPipe: microbatches enter the pipeline at both ends, and meet as overlapped pairs.

4 ranks, 8 microbatches; 0 to 3 enter at rank 0 (direction 0), a to d at rank 3 (direction 1). I and W
are as long as F, an overlap as long as F and B in turn (overlapping pays by hiding communication):

    rank 0  F0 F1 F2 Fa Ia Wa Fb F3&Bb--- .. Fc&B0--- Bc--- .. Fd&B1--- Bd--- I2 W2 I3 W3
    rank 1  .. F0 Fa F1 Fb F2 Ba--- Fc&B0--- F3&Bb--- Fd&B1--- Bc--- B2--- .. Id I3 Wd W3
    rank 2  .. Fa F0 Fb F1 Fc B0--- F2&Ba--- Fd&B1--- F3&Bb--- B2--- Bc--- .. I3 Id W3 Wd
    rank 3  Fa Fb Fc F0 I0 W0 F1 Fd&B1--- .. F2&Ba--- B2--- .. F3&Bb--- B3--- Ic Wc Id Wd

Every rank holds two stages: rank r stage r of direction 0, and stage P-1-r of direction 1. Seen from
a rank, one direction is *near* (it enters at this rank's end of the pipeline) and the other *far*.
With x the distance of the rank from its end, its near stage is x and its far stage P-1-x, so both
halves of the pipeline run one and the same recipe, and near and far are words of this file alone: the
program that comes out knows absolute directions only.

The recipe, with h = P/2 and m = M/2 microbatches in each direction; [F&B] is an overlap, I a backward
that leaves its weight gradient to a later W:

    1  F near                             2(h-x-1) times
    2  F near, F far                      x+1
    3  I far, W, F far                    h-x-1
    4  [F near & B far] [F far & B near]  m-P+x+1     the steady state
    5  B far, [F far & B near]            h-x-1
    6  B far, B near                      x+1         the last x+1 of these 2(x+1) are I
    7  W, I near                          h-x-1
    8  W                                  x+1

Where bubbles threaten (3, 6, 7) the backward is cut in two: the gradient that the neighbour waits for
first, the weight gradient when there is nothing better to do. The two ranks in the middle do not
overlap the first pair of step 4: the gradient for the far backward is still on its way back then, and
the near forward need not wait with it.

At most P+1 microbatches are alive on any rank, those that still owe a W included, and the bubble is
(P/2-1)(F&B + B - 3W) as long as F = I and W <= F. Ref: DSV3 §3.2.1, Fig. 5, Table 2.

Rejected: a greedy loop over time that asks what may run now. Its rows change with the costs it is
given, and can then not be checked against the paper's.
"""

from collections import deque
from dataclasses import dataclass, field

from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program


def dualpipe(num_ranks: int, num_microbatches: int) -> Program:
    """The bidirectional DualPipe program. Ref: DSV3 §3.2.1, Fig. 5.

    Args:
        num_ranks: P, even.
        num_microbatches: M over both directions, even and at least 2P.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches // 2) for rank in range(num_ranks))
    forwards = tuple(range(num_ranks))
    return Program("dualpipe", rows, (forwards, forwards[::-1]), num_microbatches)


@dataclass(slots=True)
class _Lane:
    """One direction as one rank sees it: the stage it holds and how many microbatches have passed."""

    stage: int
    direction: int
    forwards: int = 0
    backwards: int = 0

    def next_forward(self) -> Action:
        self.forwards += 1
        return Action(Kind.FORWARD, self.stage, self.forwards - 1, self.direction)

    def next_backward(self, kind: Kind = Kind.BACKWARD) -> Action:
        self.backwards += 1
        return Action(kind, self.stage, self.backwards - 1, self.direction)


@dataclass(slots=True)
class _Row:
    """One rank's entries as they are written down."""

    entries: list[Entry] = field(default_factory=list)
    owed: deque[Action] = field(default_factory=deque)  # the W of every I so far, oldest first

    def forward(self, lane: _Lane) -> None:
        self.entries.append(lane.next_forward())

    def backward(self, lane: _Lane) -> None:
        self.entries.append(lane.next_backward())

    def input_grad(self, lane: _Lane) -> None:
        action = lane.next_backward(Kind.INPUT_GRAD)
        self.entries.append(action)
        self.owed.append(Action(Kind.WEIGHT_GRAD, action.stage, action.microbatch, action.direction))

    def weight_grad(self) -> None:
        self.entries.append(self.owed.popleft())

    def overlap(self, forward: _Lane, backward: _Lane) -> None:
        self.entries.append(Overlap(forward.next_forward(), backward.next_backward()))


def _row(rank: int, num_ranks: int, per_direction: int) -> tuple[Entry, ...]:
    from_end = min(rank, num_ranks - 1 - rank)
    near_direction = 0 if rank < num_ranks // 2 else 1
    near = _Lane(from_end, near_direction)
    far = _Lane(num_ranks - 1 - from_end, 1 - near_direction)
    to_middle = num_ranks // 2 - from_end - 1
    row = _Row()
    _fill(row, near, far, from_end, to_middle)
    _steady(row, near, far, per_direction - num_ranks + from_end + 1, is_middle=to_middle == 0)
    _drain(row, near, far, from_end, to_middle)
    return tuple(row.entries)


def _fill(row: _Row, near: _Lane, far: _Lane, from_end: int, to_middle: int) -> None:
    for _ in range(2 * to_middle):  # step 1
        row.forward(near)
    for _ in range(from_end + 1):  # step 2
        row.forward(near)
        row.forward(far)
    for _ in range(to_middle):  # step 3
        row.input_grad(far)
        row.weight_grad()
        row.forward(far)


def _steady(row: _Row, near: _Lane, far: _Lane, pairs: int, is_middle: bool) -> None:
    for pair in range(pairs):  # step 4
        if is_middle and pair == 0:
            row.forward(near)
            row.backward(far)
        else:
            row.overlap(near, far)
        row.overlap(far, near)


def _drain(row: _Row, near: _Lane, far: _Lane, from_end: int, to_middle: int) -> None:
    for _ in range(to_middle):  # step 5
        row.backward(far)
        row.overlap(far, near)
    for backward in range(2 * (from_end + 1)):  # step 6
        lane = near if backward % 2 else far
        if backward <= from_end:
            row.backward(lane)
        else:
            row.input_grad(lane)
    for _ in range(to_middle):  # step 7
        row.weight_grad()
        row.input_grad(near)
    for _ in range(from_end + 1):  # step 8
        row.weight_grad()
