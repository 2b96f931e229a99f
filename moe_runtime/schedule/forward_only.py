"""A program of forwards alone, for validation: the pipeline fills once and drains once.

    rank 0   F0 F1 F2 F3
    rank 1      F0 F1 F2 F3         with two directions, mirrored, the two alternate
    rank 2         F0 F1 F2 F3

Each rank takes its forwards in the order of microbatch + stage, which is the order in which their
inputs can be there; so no rank waits for one that waits for it. It is not a training program: `check`
would miss the backwards, and is not asked.
"""

from moe_runtime.schedule.action import Action, Kind, Program
from moe_runtime.schedule.passes import add_transfers


def forward_only(placement: tuple[tuple[int, ...], ...], num_microbatches: int) -> Program:
    """Forwards of every microbatch, with transfers.

    Args:
        placement: `placement[direction][stage]` is the pipeline rank.
        num_microbatches: over all directions; a multiple of their number.
    """
    per_direction = num_microbatches // len(placement)
    num_ranks = 1 + max(max(ranks) for ranks in placement)
    forwards = [
        (microbatch + stage, direction, holder, Action(Kind.FORWARD, stage, microbatch, direction))
        for direction, ranks in enumerate(placement)
        for stage, holder in enumerate(ranks)
        for microbatch in range(per_direction)
    ]
    forwards.sort(key=lambda entry: entry[:2])
    rows = tuple(
        tuple(action for _, _, holder, action in forwards if holder == rank) for rank in range(num_ranks)
    )
    return add_transfers(Program("forward_only", rows, placement, per_direction * len(placement)))
