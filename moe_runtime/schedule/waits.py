"""Where a rank may have to wait, and for which entry of which other rank.

Three things can hold a rank up, and each is one entry of one other rank, fixed by the program:

- before transfers are added, a computation waits for the computation that makes its input;
- afterwards, it waits for the send that meets its receive;
- with room for N unmatched sends between a pair of ranks, a send waits until the receive N messages
  before its own has been posted.
"""

from moe_runtime.schedule.action import Action, Program
from moe_runtime.schedule.matching import Channels
from moe_runtime.schedule.neighbours import Neighbours, neighbours_of, receive_that_meets

Cause = tuple[int, int]  # rank and position of the entry that is waited for
Waits = list[dict[int, list[Cause]]]  # waits[rank][position], of positions that may have to wait


def waits_of(program: Program, channels: Channels, max_unmatched: int | None = None) -> Waits:
    """All waits of a program.

    Args:
        channels: as `check_matching` gives them.
        max_unmatched: N; None for no limit.
    """
    neighbours = neighbours_of(program)
    arrivals = _from_sends(program, channels) if channels else _from_computations(program, neighbours)
    waits: Waits = [{} for _ in program.rows]
    for rank, row in enumerate(program.rows):
        for position, entry in enumerate(row):
            receives = neighbours.receives_for(entry)
            if receives:
                waits[rank][position] = [arrivals[receive] for receive in receives]
    if max_unmatched is not None:
        for (source, target), channel in channels.items():
            for send, received_at in zip(channel.sends[max_unmatched:], channel.receives, strict=False):
                waits[source][send] = [(target, received_at)]
    return waits


def _from_sends(program: Program, channels: Channels) -> dict[Action, Cause]:
    """Of each receive, the send that it meets."""
    arrivals: dict[Action, Cause] = {}
    for (source, target), channel in channels.items():
        row = program.rows[target]
        for sent_at, received_at in zip(channel.sends, channel.receives, strict=True):
            receive = row[received_at]
            assert isinstance(receive, Action)
            arrivals[receive] = (source, sent_at)
    return arrivals


def _from_computations(program: Program, neighbours: Neighbours) -> dict[Action, Cause]:
    """Of each receive that lowering would add, the computation that makes its tensor."""
    return {
        receive_that_meets(send): (rank, position)
        for rank, row in enumerate(program.rows)
        for position, entry in enumerate(row)
        for send in neighbours.sends_of(entry)
    }
