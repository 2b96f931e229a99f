"""Moves boundary tensors between pipeline ranks, always asynchronously: start, then wait.

Matching never relies on tags: for each ordered pair of ranks the sequence of sends is the sequence of
receives (the schedule's checker proves it), and each ordered pair has a channel of its own, so a
transfer in one direction never waits behind one in the other.
"""

from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Transfer(Protocol):
    """A transfer that has been started."""

    def wait(self) -> object:
        """Block until the tensor has left or arrived."""
        ...


class Transport(Protocol):
    """Starts transfers to and from pipeline ranks of this lane."""

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        """Start sending a contiguous tensor; it must not change before `wait` returns."""
        ...

    def receive(self, buffer: Tensor, peer: int) -> Transfer:
        """Start receiving into `buffer`, of the sender's shape and dtype."""
        ...


class TorchTransport:
    """Transport over torch.distributed (gloo or NCCL).

    Args:
        pp_rank: this pipeline rank.
        global_ranks: global rank of every pipeline rank of this lane.
        up: group that carries what goes to a higher pipeline rank.
        down: group that carries what goes to a lower one.
    """

    def __init__(
        self, pp_rank: int, global_ranks: list[int], up: dist.ProcessGroup, down: dist.ProcessGroup
    ) -> None:
        self._pp_rank = pp_rank
        self._global_ranks = global_ranks
        self._up = up
        self._down = down

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        group = self._up if peer > self._pp_rank else self._down
        work = dist.isend(tensor, self._global_ranks[peer], group=group)
        assert work is not None, "isend gives None only to a rank outside its group"
        return work

    def receive(self, buffer: Tensor, peer: int) -> Transfer:
        group = self._down if peer > self._pp_rank else self._up
        work = dist.irecv(buffer, self._global_ranks[peer], group=group)
        assert work is not None, "irecv gives None only to a rank outside its group"
        return work
