"""One pipeline rank: no pipeline at all, each microbatch forwards and at once backwards.

    rank 0  F0 B0--- F1 B1--- F2 B2--- F3 B3---

One microbatch's activations are alive at a time, so M costs no memory: this is plain gradient
accumulation written as a program.
"""

from moe_runtime.schedule.action import Action, Kind, Program


def single(num_ranks: int, num_microbatches: int) -> Program:
    """The program of a model that is whole on every rank.

    Args:
        num_ranks: 1.
        num_microbatches: M, any positive number.
    """
    row = tuple(
        Action(kind, 0, microbatch)
        for microbatch in range(num_microbatches)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    )
    return Program("single", (row,) * num_ranks, ((0,),), num_microbatches)
