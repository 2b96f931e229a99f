"""GPipe: all forwards, then all backwards.

4 ranks, 4 microbatches, a backward twice as long as a forward; dots are the bubble:

    rank 0  F0 F1 F2 F3 .. .. .. .. .. .. .. .. .. B0--- B1--- B2--- B3---
    rank 1  .. F0 F1 F2 F3 .. .. .. .. .. .. B0--- B1--- B2--- B3--- .. ..
    rank 2  .. .. F0 F1 F2 F3 .. .. .. B0--- B1--- B2--- B3--- .. .. .. ..
    rank 3  .. .. .. F0 F1 F2 F3 B0--- B1--- B2--- B3--- .. .. .. .. .. ..

The bubble is (P-1)(F+B), as 1F1B's, but all M microbatches are alive at the turn. The paper's figure
runs the backwards from the last microbatch to the first; here they run in the order of the forwards,
at the same cost, so that gradients are summed in the same order as in every other schedule.
Ref: Huang et al., arXiv:1811.06965, Fig. 2c.
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.lanes import Lane, Row
from moe_runtime.schedule.placement import looped


def gpipe(num_ranks: int, num_microbatches: int) -> Program:
    """The GPipe program: rank r holds stage r.

    Args:
        num_ranks: P, any positive number.
        num_microbatches: M, any positive number.
    """
    rows = tuple(_row(rank, num_microbatches) for rank in range(num_ranks))
    return Program("gpipe", rows, looped(num_ranks), num_microbatches)


def _row(rank: int, num_microbatches: int) -> tuple[Entry, ...]:
    row, lane = Row(), Lane(rank)
    for _ in range(num_microbatches):
        row.forward(lane)
    for _ in range(num_microbatches):
        row.backward(lane)
    return tuple(row.entries)
