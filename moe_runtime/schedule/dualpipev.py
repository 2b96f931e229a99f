"""DualPipeV: DualPipe cut in half, so that no stage is held twice.

4 ranks, 8 stages, 8 microbatches. A rank's first stage is written in capitals (F0), its second in
small letters (f0). I and W are as long as F, an overlap as long as F and B in turn:

    rank 0  F0 F1 F2 F3 F4 F5 F6 f0 i0 w0 f1 i1 w1 f2 i2 w2 f3 F7&b3--- .. .. .. f4&B0--- b4-
    rank 1  .. F0 F1 F2 F3 F4 f0 F5 f1 i0 w0 f2 i1 w1 f3 F6&b2--- .. .. f4&B0--- F7&b3--- f5&
    rank 2  .. .. F0 F1 F2 f0 F3 f1 F4 f2 i0 w0 f3 F5&b1--- .. f4&B0--- F6&b2--- f5&B1--- F7&
    rank 3  .. .. .. F0 f0 F1 f1 F2 f2 F3 f3 F4 b0--- f4&B0--- F5&b1--- f5&B1--- F6&b2--- f6&

    rank 0  -- .. f5&B1--- b5--- .. f6&B2--- b6--- .. f7&B3--- b7--- I4 W4 I5 W5 I6 W6 I7 W7
    rank 1  B1--- b4--- .. f6&B2--- b5--- .. f7&B3--- b6--- B4--- .. i7 I5 w7 I6 W5 I7 W6 W7
    rank 2  b3--- f6&B2--- b4--- .. f7&B3--- b5--- B4--- .. b6--- I5 .. i7 I6 W5 I7 w7 W6 W7
    rank 3  B2--- F7&b3--- f7&B3--- b4--- B4--- .. b5--- B5--- .. i6 I6 .. i7 I7 w6 W6 w7 W7

DualPipe's two halves do the same work on the same weights, each for its own direction. Keep one half,
and let its middle rank turn round and pass the microbatches to itself instead of to its mirror image:
the stages now run along a V, rank r holds stage r (near: microbatches come in there) and stage 2P-1-r
(far: they have been everywhere else), and the rows are the same `eight_steps` with h = P. What DualPipe
does on 2P ranks with every stage twice, this does on P ranks with every stage once.

At most 2P+1 stage activations are alive on any rank, those that still owe a W included, and the
bubble is (P-1)(F&B + B - 3W) as long as F = I and W <= F, costs of one of the 2P stages.
Ref: github.com/deepseek-ai/DualPipe, DualPipeV; Qi et al., arXiv:2405.15362 for the V.
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.eight_steps import eight_steps
from moe_runtime.schedule.lanes import Lane
from moe_runtime.schedule.placement import folded


def dualpipev(num_ranks: int, num_microbatches: int) -> Program:
    """The DualPipeV program: 2P stages along a V.

    Args:
        num_ranks: P, any positive number.
        num_microbatches: M, at least 2P.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches) for rank in range(num_ranks))
    return Program("dualpipev", rows, folded(num_ranks), num_microbatches)


def _row(rank: int, num_ranks: int, num_microbatches: int) -> tuple[Entry, ...]:
    near, far = Lane(rank), Lane(2 * num_ranks - 1 - rank)
    return eight_steps(near, far, rank, num_ranks, num_microbatches)
