"""Who exchanges what with whom: the places where a tensor must cross from one rank to another.

A message is named by the receive that takes it in: its stage, microbatch and direction are those of the
computation that needs it, so a computation, its receive and its send only differ in the kind.
"""

from itertools import pairwise
from typing import NamedTuple

from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program

# Looked up once: until Python 3.12 a member is fetched from its enum by a slow descriptor.
_SEND_ACT, _RECV_ACT = Kind.SEND_ACT, Kind.RECV_ACT
_SEND_GRAD, _RECV_GRAD = Kind.SEND_GRAD, Kind.RECV_GRAD

OtherRanks = tuple[tuple[int | None, ...], ...]  # [direction][stage]


class Neighbours(NamedTuple):
    """For each stage the *other* rank that holds its neighbour; None at an end, or if it is the same.

    Args:
        before: `before[direction][stage]` is the rank of stage - 1.
        after: `after[direction][stage]` is the rank of stage + 1.
    """

    before: OtherRanks
    after: OtherRanks

    def receive_for(self, computation: Action) -> Action | None:
        """The receive of what a computation needs from another rank; None if it needs nothing."""
        kind, stage, microbatch, direction = computation
        if kind.makes_activation and self.before[direction][stage] is not None:
            return Action(_RECV_ACT, stage, microbatch, direction)
        if kind.makes_gradient and self.after[direction][stage] is not None:
            return Action(_RECV_GRAD, stage, microbatch, direction)
        return None

    def send_of(self, computation: Action) -> Action | None:
        """The send of what a computation makes for another rank; None if nobody there needs it."""
        kind, stage, microbatch, direction = computation
        if kind.makes_activation and self.after[direction][stage] is not None:
            return Action(_SEND_ACT, stage, microbatch, direction)
        if kind.makes_gradient and self.before[direction][stage] is not None:
            return Action(_SEND_GRAD, stage, microbatch, direction)
        return None

    def peer_of(self, transfer: Action) -> int | None:
        """The rank at the other end of a transfer; None if there is no other rank."""
        kind, stage, _, direction = transfer
        ranks = self.after if kind is _SEND_ACT or kind is _RECV_GRAD else self.before
        return ranks[direction][stage]

    def receives_for(self, entry: Entry) -> list[Action]:
        """The receives of everything that an entry needs from other ranks, the forward's first."""
        if isinstance(entry, Overlap):
            return self.receives_for(entry.forward) + self.receives_for(entry.backward)
        receive = self.receive_for(entry)
        return [] if receive is None else [receive]

    def sends_of(self, entry: Entry) -> list[Action]:
        """The sends of everything that an entry makes for other ranks, the activation first."""
        if isinstance(entry, Overlap):
            return self.sends_of(entry.forward) + self.sends_of(entry.backward)
        send = self.send_of(entry)
        return [] if send is None else [send]


def neighbours_of(program: Program) -> Neighbours:
    """The neighbours of every stage of a program."""
    before, after = [], []
    for holders in program.placement:
        pairs = list(pairwise(holders))
        before.append((None, *(ahead if ahead != here else None for ahead, here in pairs)))
        after.append((*(behind if behind != here else None for here, behind in pairs), None))
    return Neighbours(tuple(before), tuple(after))


def receive_that_meets(send: Action) -> Action:
    """The receive, on the other rank, of what a send sends."""
    kind, stage, microbatch, direction = send
    if kind is _SEND_ACT:
        return Action(_RECV_ACT, stage + 1, microbatch, direction)
    return Action(_RECV_GRAD, stage - 1, microbatch, direction)
