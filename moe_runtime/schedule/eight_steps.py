"""The row that DualPipe and DualPipeV share: two lanes that meet as overlapped pairs, in eight steps.

Seen from a rank, microbatches come into its *near* lane fresh (from the end of the pipeline where the
rank stands) and into its *far* lane when they have been almost everywhere else. With x the distance of
the rank from its end, h - 1 the greatest such distance, and m microbatches in each lane; [F&B] is an
overlap, I a backward that leaves its weight gradient to a later W:

    1  F near                             2(h-x-1) times
    2  F near, F far                      x+1
    3  I far, W, F far                    h-x-1
    4  [F near & B far] [F far & B near]  m-2h+x+1    the steady state
    5  B far, [F far & B near]            h-x-1
    6  B far, B near                      x+1         the last x+1 of these 2(x+1) are I
    7  W, I near                          h-x-1
    8  W                                  x+1

Where bubbles threaten (3, 6, 7) the backward is cut in two: the gradient that the neighbour waits for
first, the weight gradient when there is nothing better to do. The ranks at the turn (x = h-1) do not
overlap the first pair of step 4: the gradient for the far backward is still on its way back then, and
the near forward need not wait with it. Ref: DSV3 §3.2.1, Fig. 5.

Rejected: a greedy loop over time that asks what may run now. Its rows change with the costs it is
given, and can then not be checked against the paper's.
"""

from moe_runtime.schedule.action import Entry
from moe_runtime.schedule.lanes import Lane, Row


def eight_steps(near: Lane, far: Lane, from_end: int, num_places: int, per_lane: int) -> tuple[Entry, ...]:
    """One rank's row.

    Args:
        from_end: x, 0 to h-1.
        num_places: h, ranks from an end to the turn.
        per_lane: m, at least 2h.
    """
    to_turn = num_places - from_end - 1
    row = Row()
    _fill(row, near, far, from_end, to_turn)
    _steady(row, near, far, per_lane - 2 * num_places + from_end + 1, is_turn=to_turn == 0)
    _drain(row, near, far, from_end, to_turn)
    return tuple(row.entries)


def _fill(row: Row, near: Lane, far: Lane, from_end: int, to_turn: int) -> None:
    for _ in range(2 * to_turn):  # step 1
        row.forward(near)
    for _ in range(from_end + 1):  # step 2
        row.forward(near)
        row.forward(far)
    for _ in range(to_turn):  # step 3
        row.input_grad(far)
        row.weight_grad()
        row.forward(far)


def _steady(row: Row, near: Lane, far: Lane, pairs: int, is_turn: bool) -> None:
    for pair in range(pairs):  # step 4
        if is_turn and pair == 0:
            row.forward(near)
            row.backward(far)
        else:
            row.overlap(near, far)
        row.overlap(far, near)


def _drain(row: Row, near: Lane, far: Lane, from_end: int, to_turn: int) -> None:
    for _ in range(to_turn):  # step 5
        row.backward(far)
        row.overlap(far, near)
    for backward in range(2 * (from_end + 1)):  # step 6
        lane = near if backward % 2 else far
        if backward <= from_end:
            row.backward(lane)
        else:
            row.input_grad(lane)
    for _ in range(to_turn):  # step 7
        row.weight_grad()
        row.input_grad(near)
    for _ in range(from_end + 1):  # step 8
        row.weight_grad()
