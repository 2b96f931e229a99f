"""1F1B: warm up, then one forward and one backward in turn, then drain.

4 ranks, 6 microbatches, a backward twice as long as a forward; dots are the bubble:

    rank 0  F0 F1 F2 F3 .. .. .. .. .. .. B0--- F4 B1--- F5 B2--- .. B3--- .. B4--- .. B5---
    rank 1  .. F0 F1 F2 .. .. .. .. B0--- F3 B1--- F4 B2--- F5 B3--- .. B4--- .. B5--- .. ..
    rank 2  .. .. F0 F1 .. .. B0--- F2 B1--- F3 B2--- F4 B3--- F5 B4--- .. B5--- .. .. .. ..
    rank 3  .. .. .. F0 B0--- F1 B1--- F2 B2--- F3 B3--- F4 B4--- F5 B5--- .. .. .. .. .. ..

Rank r starts P-1-r forwards ahead of its first backward, so P-r microbatches are alive at most,
whatever M is. The bubble is (P-1)(F+B). Ref: DSV3 Table 2.
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.lanes import Lane, Row
from moe_runtime.schedule.placement import looped


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Program:
    """The 1F1B program: rank r holds stage r.

    Args:
        num_ranks: P, any positive number.
        num_microbatches: M, any positive number; fewer than P leave some ranks with idle warm-up.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("1f1b", rows, looped(num_ranks), num_microbatches)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Entry, ...]:
    row, lane = Row(), Lane(rank)
    ahead = min(num_ranks - 1 - rank, num_microbatches)
    for _ in range(ahead):
        row.forward(lane)
    for _ in range(num_microbatches - ahead):
        row.forward(lane)
        row.backward(lane)
    for _ in range(ahead):
        row.backward(lane)
    return tuple(row.entries)
