"""DualPipe: microbatches enter the pipeline at both ends, and meet as overlapped pairs.

4 ranks, 8 microbatches; 0 to 3 enter at rank 0 (direction 0), a to d at rank 3 (direction 1). I and W
are as long as F, an overlap as long as F and B in turn (overlapping pays by hiding communication):

    rank 0  F0 F1 F2 Fa Ia Wa Fb F3&Bb--- .. Fc&B0--- Bc--- .. Fd&B1--- Bd--- I2 W2 I3 W3
    rank 1  .. F0 Fa F1 Fb F2 Ba--- Fc&B0--- F3&Bb--- Fd&B1--- Bc--- B2--- .. Id I3 Wd W3
    rank 2  .. Fa F0 Fb F1 Fc B0--- F2&Ba--- Fd&B1--- F3&Bb--- B2--- Bc--- .. I3 Id W3 Wd
    rank 3  Fa Fb Fc F0 I0 W0 F1 Fd&B1--- .. F2&Ba--- B2--- .. F3&Bb--- B3--- Ic Wc Id Wd

Every rank holds two stages: rank r stage r of direction 0, and stage P-1-r of direction 1. So one
direction is near its end of the pipeline and the other far from it, with h = P/2 ranks from an end to
the middle; both halves of the pipeline run one and the same recipe, `eight_steps`. Near and far are
words of the recipe alone: the program that comes out knows absolute directions only.

At most P+1 microbatches are alive on any rank, those that still owe a W included, and the bubble is
(P/2-1)(F&B + B - 3W) as long as F = I and W <= F. Ref: DSV3 §3.2.1, Fig. 5, Table 2.
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.eight_steps import eight_steps
from moe_runtime.schedule.lanes import Lane
from moe_runtime.schedule.placement import mirrored


def dualpipe(num_ranks: int, num_microbatches: int) -> Program:
    """The bidirectional DualPipe program. Ref: DSV3 §3.2.1, Fig. 5.

    Args:
        num_ranks: P, even.
        num_microbatches: M over both directions, even and at least 2P.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches // 2) for rank in range(num_ranks))
    return Program("dualpipe", rows, mirrored(num_ranks), num_microbatches)


def _row(rank: int, num_ranks: int, per_direction: int) -> tuple[Entry, ...]:
    from_end = min(rank, num_ranks - 1 - rank)
    near_direction = 0 if rank < num_ranks // 2 else 1
    near = Lane(from_end, near_direction)
    far = Lane(num_ranks - 1 - from_end, 1 - near_direction)
    return eight_steps(near, far, from_end, num_ranks // 2, per_direction)
