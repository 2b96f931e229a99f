"""ZB1P (ZB-H1): 1F1B whose weight gradients wait for the bubble.

4 ranks, 6 microbatches; F, I and W take one step each:

    rank 0  F0 F1 F2 F3 .. .. .. I0 W0 F4 I1 W1 F5 I2 W2 I3 W3 I4 W4 I5 W5
    rank 1  .. F0 F1 F2 .. .. I0 F3 I1 W0 F4 I2 W1 F5 I3 W2 I4 W3 I5 W4 W5
    rank 2  .. .. F0 F1 .. I0 F2 I1 F3 I2 W0 F4 I3 W1 F5 I4 W2 I5 W3 W4 W5
    rank 3  .. .. .. F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 F5 I5 W2 W3 W4 W5

1F1B makes its neighbour wait for a weight gradient that the neighbour does not need. Here B is cut in
two: I at once, W later. Forwards and I stand as F and B do in 1F1B, rank r starting P-1-r forwards
ahead; W starts r microbatches late, so the rank that is fewer forwards ahead owes more W, and every
rank has P microbatches alive, those that owe a W included: 1F1B's most, on its first rank. The W that
are owed at the end fill the gaps of the drain, one after each I, where 1F1B would idle.

The bubble is (P-1)(F+I-W) as long as W <= F, W <= I and M >= P: a third of 1F1B's when all
three are equal.
Ref: Qi et al., arXiv:2401.10241, Fig. 3 (ZB-H1); DSV3 Table 2 (ZB1P, where B = I + W).
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.lanes import Lane, Row
from moe_runtime.schedule.placement import looped


def zb1p(num_ranks: int, num_microbatches: int) -> Program:
    """The ZB-H1 program: rank r holds stage r.

    Args:
        num_ranks: P, any positive number.
        num_microbatches: M, any positive number.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("zb1p", rows, looped(num_ranks), num_microbatches)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Entry, ...]:
    row, lane = Row(), Lane(rank)
    ahead = min(num_ranks - 1 - rank, num_microbatches)
    for _ in range(ahead):
        row.forward(lane)
    for _ in range(num_microbatches - ahead):
        row.forward(lane)
        row.input_grad(lane)
        if len(row.owed) > rank:
            row.weight_grad()
    for _ in range(ahead):
        row.input_grad(lane)
        row.weight_grad()
    while row.owed:
        row.weight_grad()
    return tuple(row.entries)
