"""Interleaved 1F1B: each rank holds several thinner stages, so the pipeline fills sooner.

4 ranks, 8 stages, 8 microbatches. A rank's first stage is written in capitals (F0), its second in
small letters (f0); a backward is twice as long as a forward:

    rank 0  F0 F1 F2 F3 f0 f1 f2 f3 F4 F5 F6 .. .. .. b0--- F7 b1--- .. f4 b2--- f5 b3--- f6 B0---
    rank 1  .. F0 F1 F2 F3 f0 f1 f2 f3 F4 .. .. b0--- F5 b1--- F6 b2--- F7 b3--- f4 B0--- f5 B1---
    rank 2  .. .. F0 F1 F2 F3 f0 f1 f2 .. b0--- f3 b1--- F4 b2--- F5 b3--- F6 B0--- F7 B1--- f4 B2-
    rank 3  .. .. .. F0 F1 F2 F3 f0 b0--- f1 b1--- f2 b2--- f3 b3--- F4 B0--- F5 B1--- F6 B2--- F7

    rank 0  f7 B1--- B2--- .. B3--- .. b4--- .. b5--- .. b6--- .. b7--- B4--- B5--- B6--- B7---
    rank 1  f6 B2--- f7 B3--- .. b4--- .. b5--- .. b6--- .. b7--- B4--- B5--- B6--- B7--- .. ..
    rank 2  -- f5 B3--- f6 b4--- f7 b5--- .. b6--- .. b7--- B4--- B5--- B6--- B7--- .. .. .. ..
    rank 3  B3--- f4 b4--- f5 b5--- f6 b6--- f7 b7--- B4--- B5--- B6--- B7--- .. .. .. .. .. ..

With v stages a rank (chunks), stage s is on rank s % P, and a microbatch goes round the ranks v times.
Microbatches go in rounds of P: a rank runs its first chunk for all P of them, then its second, and so
on; backwards likewise, last chunk first. Rank r starts (v-1)P + 2(P-1-r) forwards ahead, then one
forward and one backward in turn, then drains.

The bubble is (P-1)(F+B) in costs of one thin stage, a v-th of 1F1B's, when P divides M. At most
(v-1)P + 2(P-1-r) + 1 thin activations are alive on rank r: 1 + (P-1)/(Pv) times 1F1B's memory on the
first rank. Ref: Narayanan et al., arXiv:2104.04473, §2.2, Fig. 4.

The paper asks for M a multiple of P. Any other M runs as the next multiple with the missing microbatches
of the last round left out: see `Row.up_to` for why that is safe.

Rejected: a shorter last round, counted through. The first rank can then wait for a forward that the
last rank puts behind a backward which the first rank has yet to make (P = 5, M = 7 deadlocks), and
where it ends its bubble is never smaller.
"""

from moe_runtime.schedule.action import Entry, Program
from moe_runtime.schedule.lanes import Lane, Row
from moe_runtime.schedule.placement import looped


def interleaved(num_ranks: int, num_microbatches: int, num_chunks: int = 2) -> Program:
    """The interleaved 1F1B program: rank r holds stages r, P+r, 2P+r, ...

    Args:
        num_ranks: P, any positive number.
        num_microbatches: M, any positive number; a multiple of P wastes nothing.
        num_chunks: v, stages a rank, at least 2.
    """
    rows = tuple(_row(rank, num_ranks, num_microbatches, num_chunks) for rank in range(num_ranks))
    return Program("interleaved", rows, looped(num_ranks, num_chunks), num_microbatches)


def _row(rank: int, num_ranks: int, num_microbatches: int, num_chunks: int) -> tuple[Entry, ...]:
    lanes = [Lane(chunk * num_ranks + rank) for chunk in range(num_chunks)]
    num_rounds = -(-num_microbatches // num_ranks)
    one_round = [lane for lane in lanes for _ in range(num_ranks)]
    forwards = one_round * num_rounds
    backwards = one_round[::-1] * num_rounds
    ahead = min((num_chunks - 1) * num_ranks + 2 * (num_ranks - 1 - rank), len(forwards))
    row = Row()
    for lane in forwards[:ahead]:
        row.forward(lane)
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        row.forward(forward)
        row.backward(backward)
    for backward in backwards[len(forwards) - ahead :]:
        row.backward(backward)
    return row.up_to(num_microbatches)
