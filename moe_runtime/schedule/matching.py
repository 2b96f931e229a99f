"""Messages without tags: for each ordered pair of ranks, sends and receives in the same order.

NCCL has no tags, and a gloo tag would only hide a wrong order until the day it meets NCCL. The n-th
message that rank a posts for rank b is the n-th that b posts from a; here it is proved that both mean
the same tensor.
"""

from collections import defaultdict
from dataclasses import dataclass, field

from moe_runtime.errors import ScheduleError
from moe_runtime.schedule.action import Action, Program, where
from moe_runtime.schedule.neighbours import neighbours_of, receive_that_meets


@dataclass(slots=True)
class Channel:
    """The messages of one ordered pair of ranks: positions in the sender's and the receiver's row."""

    sends: list[int] = field(default_factory=list)
    receives: list[int] = field(default_factory=list)


Channels = dict[tuple[int, int], Channel]


def check_matching(program: Program) -> Channels:
    """Check that every receive gets the message that it means.

    Returns:
        the channels by (sending rank, receiving rank); none before transfers are added.

    Raises:
        ScheduleError: names the send and the receive that meet but differ, or the one left alone.
    """
    neighbours = neighbours_of(program)
    channels: Channels = defaultdict(Channel)
    for rank, row in enumerate(program.rows):
        for position, entry in enumerate(row):
            if isinstance(entry, Action) and entry.kind.is_transfer:
                peer = neighbours.peer_of(entry)
                assert peer is not None, f"completeness.py lets {entry} pass, which has no other rank"
                if entry.kind.is_send:
                    channels[rank, peer].sends.append(position)
                else:
                    channels[peer, rank].receives.append(position)
    for (source, target), channel in channels.items():
        _check_channel(program, source, target, channel)
    return channels


def _check_channel(program: Program, source: int, target: int, channel: Channel) -> None:
    # completeness.py has proved that both sides name the same set of tensors, so the lengths agree
    for sent_at, received_at in zip(channel.sends, channel.receives, strict=True):
        send, receive = program.rows[source][sent_at], program.rows[target][received_at]
        assert isinstance(send, Action) and isinstance(receive, Action)
        if receive_that_meets(send) != receive:
            ends = f"{where(target, received_at, receive)} meets {where(source, sent_at, send)}"
            raise ScheduleError(f"{ends}; post receives in the sender's order")
