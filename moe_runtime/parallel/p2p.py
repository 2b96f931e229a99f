"""Moves boundary tensors between pipeline ranks, always asynchronously: start, then wait.

Matching never relies on tags: for each ordered pair of ranks the sequence of sends is the sequence of
receives (the schedule's checker proves it), and each ordered pair has a channel of its own, so a
transfer in one direction never waits behind one in the other.

A tensor that leaves is held until it has left, and no longer: where waiting blocks a thread (gloo), one
beside the rank's own waits for the sends in their order and lets each tensor go.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from moe_comm.lane import Job, Lane
from torch import Tensor

from moe_runtime.parallel.mesh import Groups, Mesh


class Transfer(Protocol):
    """A transfer that has been started."""

    def wait(self) -> object:
        """Block until the tensor has left or arrived."""
        ...


def wait_for(transfer: Transfer) -> None:
    """Wait for a transfer, in a frame of this file: readers of stacks know by it that a rank only waits."""
    transfer.wait()


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


class ThroughHost:
    """Boundary tensors of a GPU over a transport of the host, by way of pinned memory.

    For several processes on one GPU, which NCCL refuses; to be right there, not fast: a send waits until
    the tensor is in host memory. Its transfers hold their buffers.

    Args:
        transport: moves host tensors.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def send(self, tensor: Tensor, peer: int) -> Transfer:
        below = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        below.copy_(tensor)
        return _Staged(self._transport.send(below, peer), below, None)

    def receive(self, buffer: Tensor, peer: int) -> Transfer:
        below = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=buffer.is_cuda)
        return _Staged(self._transport.receive(below, peer), below, buffer)


@dataclass(frozen=True)
class _Staged:
    """A transfer of `below`, which goes up into `above` when it has arrived."""

    transfer: Transfer
    below: Tensor
    above: Tensor | None

    def wait(self) -> None:
        self.transfer.wait()
        if self.above is not None:
            self.above.copy_(self.below, non_blocking=True)


def open_transport(mesh: Mesh, groups: Groups, device: torch.device) -> Transport | None:
    """Between pipeline ranks of this lane, over the host where gloo joins GPUs; None without a pipeline."""
    if mesh.pp == 1:
        return None
    assert groups.pipe_up is not None and groups.pipe_down is not None
    lane = [mesh.rank_at(row) for row in range(mesh.pp)]
    transport = TorchTransport(mesh.pp_rank, lane, groups.pipe_up, groups.pipe_down)
    over_host = device.type == "cuda" and dist.get_backend(groups.pipe_up) == "gloo"
    return ThroughHost(transport) if over_host else transport


class Departures:
    """Holds what is being sent until it has left.

    Args:
        left: told (name, time of the posting) when a tensor has left.
    """

    def __init__(self, left: Callable[[str, float], None]) -> None:
        self._left = left
        self._lane = Lane("departures")
        self._jobs: list[Job[None]] = []
        self._held: list[tuple[Transfer, Tensor]] = []  # on CUDA, where waiting blocks no thread

    def add(self, name: str, transfer: Transfer, tensor: Tensor) -> None:
        """Hold a tensor whose send has been started."""
        if tensor.is_cuda:
            self._held.append((transfer, tensor))
            return
        posted, held = time.perf_counter(), [tensor]

        def wait() -> None:
            transfer.wait()
            held.clear()
            self._left(name, posted)

        self._jobs.append(self._lane.submit(wait, tensor.device))

    def wait(self) -> None:
        """Block until everything has left; raises what a send raised."""
        for job in self._jobs:
            job.wait()
        for transfer, _ in self._held:
            transfer.wait()
        self._jobs.clear()
        self._held.clear()
