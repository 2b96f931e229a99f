"""ZB-V: two stages a rank along a V, weight gradients apart, and no bubble but the ramp.

4 ranks, 8 stages, 8 microbatches. A rank's first stage is written in capitals (F0), its second in
small letters (f0); F, I and W take one step each:

    rank 0  F0 F1 F2 F3 F4 F5 F6 f0 i0 w0 f1 i1 w1 f2 i2 w2 f3 i3 w3 F7 I0 W0 f4 i4 w4 I1
    rank 1  .. F0 F1 F2 F3 F4 f0 F5 f1 i0 w0 f2 i1 w1 f3 i2 w2 F6 I0 W0 f4 i3 w3 F7 I1 W1
    rank 2  .. .. F0 F1 F2 f0 F3 f1 F4 f2 i0 w0 f3 i1 w1 F5 I0 W0 f4 i2 w2 F6 I1 W1 f5 i3
    rank 3  .. .. .. F0 f0 F1 f1 F2 f2 F3 f3 i0 w0 F4 I0 W0 f4 i1 w1 F5 I1 W1 f5 i2 w2 F6

    rank 0  W1 f5 i5 w5 I2 W2 f6 i6 w6 I3 W3 f7 i7 w7 I4 W4 I5 W5 I6 W6 I7 W7 .. .. ..
    rank 1  f5 i4 w4 I2 W2 f6 i5 w5 I3 W3 f7 i6 w6 I4 i7 I5 W4 I6 w7 I7 W5 W6 W7 .. ..
    rank 2  w3 F7 I2 W2 f6 i4 w4 I3 W3 f7 i5 w5 I4 i6 I5 i7 I6 W4 I7 w6 W5 w7 W6 W7 ..
    rank 3  I2 W2 f6 i3 w3 F7 I3 W3 f7 i4 w4 I4 i5 I5 i6 I6 i7 I7 W4 w5 W5 w6 W6 w7 W7

A microbatch goes down the V through the ranks' first stages and comes back up through their second
ones, so its loss, and with it the first backward, is on rank 0: the rank that is first to have all the
forwards that its memory holds. Rank r runs, with 2P-1 microbatches to fill the pipe:

    fill    F                       2(P-r)-1 times
            f F                     r
            f i w                   P-r
    steady  F I W f i w             until the last f; without the F once they run out
    drain   I i                     until the last i
            I W                     until the last I
            W or w                  until none is owed

With F = I = W and M >= 2P-1 every rank idles (P-1)F and not a step more, which is what the last rank
has to wait for its first microbatch in any schedule. At most 2P stage activations, of stages half as
thick as 1F1B's, are alive on any rank, those that owe a W included: 1F1B's most, on its first rank.

A smaller M runs as M = 2P-1 with the missing microbatches left out: see `Row.up_to`.

Rejected: a greedy search over time with a bound on memory. Its rows change with the costs it is given,
and follow no law that a reader can check.
Ref: Qi et al., arXiv:2401.10241, §6 (ZB-V); arXiv:2405.15362 (V schedules and their memory).
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.lanes import Lane, Row
from moe_runtime.schedule.placement import folded


def zbv(num_ranks: int, num_microbatches: int) -> Program:
    """The ZB-V program: 2P stages along a V.

    Args:
        num_ranks: P, any positive number.
        num_microbatches: M, any positive number; 2P-1 and more fill the pipeline.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("zbv", rows, folded(num_ranks), num_microbatches)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Entry, ...]:
    row, down, up = Row(), Lane(rank), Lane(2 * num_ranks - 1 - rank)
    total = max(num_microbatches, 2 * num_ranks - 1)
    _fill(row, down, up, rank, num_ranks)
    _steady(row, down, up, total)
    _drain(row, down, up, total)
    return row.up_to(num_microbatches)


def _fill(row: Row, down: Lane, up: Lane, rank: int, num_ranks: int) -> None:
    for _ in range(2 * (num_ranks - rank) - 1):
        row.forward(down)
    for _ in range(rank):
        row.forward(up)
        row.forward(down)
    for _ in range(num_ranks - rank):
        row.forward(up)
        row.input_grad(up)
        row.weight_grad()


def _steady(row: Row, down: Lane, up: Lane, total: int) -> None:
    while up.forwards < total:
        if down.forwards < total:
            row.forward(down)
        row.input_grad(down)
        row.weight_grad()
        row.forward(up)
        row.input_grad(up)
        row.weight_grad()


def _drain(row: Row, down: Lane, up: Lane, total: int) -> None:
    while up.backwards < total:
        row.input_grad(down)
        row.input_grad(up)
    while down.backwards < total:
        row.input_grad(down)
        row.weight_grad()
    while row.owed:
        row.weight_grad()
