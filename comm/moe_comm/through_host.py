"""Rows of a GPU over a transport of the host: down into pinned memory, across, and up again.

For several processes on one GPU, which NCCL refuses: with gloo below, a whole run can be checked there. It
is a way to be right, not fast; over NCCL rows never touch the host.

Whoever starts an exchange waits until its rows are in host memory; a dispatcher's lane does that, not the
caller. Whoever waits for it queues the copy upwards on its own stream and goes on. The pinned buffers go
back to torch's allocator, which gives them out again only after the copies that read them.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_comm.dispatcher import Pending


class Swap(Protocol):
    """`Transport.all_to_all` of the host, always told where to receive."""

    def __call__(
        self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int], received: Tensor
    ) -> Pending[Tensor]: ...


def all_to_all_through_host(
    swap: Swap,
    rank: int,
    send: Tensor,
    send_splits: Sequence[int],
    recv_splits: Sequence[int],
    received: Tensor | None,
) -> Pending[Tensor]:
    """See `Transport.all_to_all`.

    Args:
        swap: exchanges host tensors.
        rank: this one.
    """
    below = _host_like(send, send.shape[0])
    below.copy_(send)
    landing = _host_like(send, sum(recv_splits))
    first = sum(recv_splits[:rank])
    own = slice(first, first + recv_splits[rank])
    if received is None:
        landing[own] = below.split(list(send_splits))[rank]
    pending = swap(below, send_splits, recv_splits, landing)
    into = torch.empty_like(landing, device=send.device) if received is None else received
    places = [slice(None)] if received is None else [slice(0, first), slice(own.stop, None)]
    return _Arrival(pending, lambda: _lift(landing, into, places))


def _host_like(rows: Tensor, count: int) -> Tensor:
    """Host memory for `count` such rows, pinned if they are a GPU's."""
    return torch.empty((count, *rows.shape[1:]), dtype=rows.dtype, pin_memory=rows.is_cuda)


def _lift(landing: Tensor, into: Tensor, places: Sequence[slice]) -> Tensor:
    """Queue the copies of these places on the current stream."""
    for place in places:
        into[place].copy_(landing[place], non_blocking=True)
    if into.is_cuda:
        into.record_stream(torch.cuda.current_stream())  # a lane's stream has made it
    return into


class _Arrival:
    """An exchange under way whose rows are to go up when they are there."""

    def __init__(self, below: Pending[Tensor], lift: Callable[[], Tensor]) -> None:
        self._below, self._lift = below, lift

    def wait(self) -> Tensor:
        """See `Pending.wait`."""
        self._below.wait()
        return self._lift()
