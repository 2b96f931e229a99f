"""The transport over torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

In a group of gloo alone CUDA tensors go through the host's memory (`through_host.py`).

gloo moves bytes on threads of its own, NCCL on a stream of its own, so either works while the caller
computes. On CUDA, waiting makes the current stream wait, not the host.

A transport opens a communicator of its own over the ranks of the group that it is given. Dispatchers
start collectives from other threads than the caller's; on a shared communicator these could get between
the caller's own, in another order on each rank. It meets its peers through the group's store, under a
name made of what all members know alike: how many transports were opened there before.

Rejected: `dist.new_group`. All ranks of the world must call it, or, with use_local_synchronization, the
name counts the groups that the process has seen, which differs between members: they then wait for
each other under different names, for ever.

Over gloo blocks are swapped by sends and receives, all receives first. gloo's own all-to-all tells a
peer that it is ready behind the data that already flows there, so a pair sends one way at a time: on
rate-limited links it takes 1.1 to 1.5 times what the links need, this 1.01 to 1.04. It also keeps its
tensors for milliseconds after the wait.

gloo forgets a transfer whose buffer is gone, and what else the pair has to say to each other then waits
behind it for ever. So an exchange that the caller drops is kept, and waited for before the next begins.

The communicator is closed with the transport, but not while an exchange is under way that nobody waits
for; and before the interpreter shuts down, when all of them have been waited for: gloo's threads, letting go
of a tensor at that moment, would abort the process.
"""

import atexit
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_comm.dispatcher import Pending
from moe_comm.errors import CommError, PlacementError, TransportError
from moe_comm.lane import end_of_leave
from moe_comm.through_host import all_to_all_through_host

_TAGS = 1 << 20  # exchanges after which tags repeat; far more than can be under way
_Transfer = tuple[Any, Tensor, Tensor]  # of a backend, and the buffers that it reads and writes
_opened: "weakref.WeakKeyDictionary[dist.ProcessGroup, int]" = weakref.WeakKeyDictionary()


class TorchTransport:
    """All-to-all between the ranks of a process group; all of them open it together.

    Args:
        group: the expert-parallel group; None is the default group. It may be destroyed meanwhile.

    Raises:
        PlacementError: no process group has been set up, or this rank is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise PlacementError(
                "a dispatcher of several ranks needs torch.distributed; call init_process_group first, or "
                "use kind 'local'"
            )
        group = dist.distributed_c10d._get_default_group() if group is None else group
        rank = dist.get_rank(group)
        if rank < 0:
            raise PlacementError(f"global rank {dist.get_rank()} is not in the expert-parallel group given")
        number = _opened[group] = _opened.get(group, 0) + 1
        store = dist.PrefixStore(f"moe_comm {number}", group.get_group_store())
        backends = {device.type: group._get_backend(device) for device in group._device_types}
        self._open({kind: _Kind.of(backend) for kind, backend in backends.items()}, store, rank, group.size())

    def _open(self, kinds: "dict[str, _Kind]", store: dist.Store, rank: int, size: int) -> None:
        self._kinds, self._store, self._rank, self._size = kinds, store, rank, size
        self._splits: Counter[tuple[int, ...]] = Counter()
        self._swaps = 0
        self._dropped: deque[list[_Transfer]] = deque()
        # A gloo group answers for CUDA tensors too, which its all-to-all cannot move.
        fitting = {"gloo": "cpu", "nccl": "cuda"}
        wanted = {device: kind for device, kind in kinds.items() if fitting[kind.name] == device}
        try:
            self._backends = {
                device: kind.open(dist.PrefixStore(device, store), rank, size)
                for device, kind in wanted.items()
            }
        except RuntimeError as error:
            raise TransportError(
                f"expert-parallel rank {rank} of {size}: not all ranks came to open a dispatcher "
                f"({str(error).strip().splitlines()[0]}); look for one that refused its arguments"
            ) from error
        on_host = "cpu" in wanted
        self._device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())
        _transports.add(self)
        weakref.finalize(self, _let_go, self._backends, self._dropped)

    @property
    def size(self) -> int:
        return self._size

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def device(self) -> torch.device:
        return self._device

    def split(self, ranks: Sequence[int]) -> "TorchTransport":
        """See `Transport.split`; with the time limit of this one."""
        members = tuple(ranks)
        self._splits[members] += 1
        store = dist.PrefixStore(f"{members} {self._splits[members]}", self._store)
        part = TorchTransport.__new__(TorchTransport)
        part._open(self._kinds, store, members.index(self._rank), len(members))
        return part

    def close(self) -> None:
        """See `Transport.close`. Exchanges under way hold the connection open until they are waited for."""
        self._backends.clear()
        self._dropped.clear()

    def all_to_all(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        received: Tensor | None = None,
    ) -> Pending[Tensor]:
        """See `Transport.all_to_all`.

        Raises:
            TransportError: here or in the wait, when the backend fails or has none for this device.
        """
        backend = self._backends.get(send.device.type)
        if backend is None and send.is_cuda and "cpu" in self._backends:
            return all_to_all_through_host(
                self.all_to_all, self._rank, send, send_splits, recv_splits, received
            )
        if backend is None:
            kinds = ", ".join(self._backends) or "no device, the transport being closed"
            raise TransportError(f"expected tensors on {kinds}, got {send.device.type}")
        shape, has_own = (sum(recv_splits), *send.shape[1:]), received is not None
        into = torch.empty(shape, dtype=send.dtype, device=send.device) if received is None else received
        out, blocks = send.split(list(send_splits)), into.split(list(recv_splits))
        try:
            while self._dropped:
                _wait_for(self._dropped.popleft())
            if send.device.type == "cpu":
                works = self._swap(backend, out, blocks)
                if not has_own:
                    blocks[self._rank].copy_(out[self._rank])
            else:
                if has_own:
                    out[self._rank].copy_(blocks[self._rank])
                works = [backend.alltoall_base(into, send, list(recv_splits), list(send_splits))]
        except RuntimeError as error:
            raise self._failed(error) from error
        return _Exchange([(work, send, into) for work in works], into, self._dropped, self._failed)

    def _swap(self, backend: Any, out: Sequence[Tensor], into: Sequence[Tensor]) -> list[Any]:
        """Swap blocks with every other rank over gloo; both sides leave empty ones out."""
        self._swaps += 1
        tag = self._swaps % _TAGS
        others = [(self._rank + shift) % self._size for shift in range(1, self._size)]
        works = [backend.recv([into[rank]], rank, tag) for rank in reversed(others) if into[rank].numel()]
        return works + [backend.send([out[rank]], rank, tag) for rank in others if out[rank].numel()]

    def _failed(self, error: RuntimeError) -> TransportError:
        cause = str(error).strip().split("\n")[0].split(". ")[0]
        return TransportError(
            f"expert-parallel rank {self._rank} of {self._size}: an all-to-all failed ({cause}); "
            "look for a peer that died or stopped"
        )


class _Exchange:
    """An exchange under way.

    Args:
        transfers: its parts, with the buffers that they need.
        received: the result.
        dropped: where transfers go that nobody waits for.
        failed: makes the error of the transport out of one of the backend.
    """

    def __init__(
        self,
        transfers: list[_Transfer],
        received: Tensor,
        dropped: deque[list[_Transfer]],
        failed: Callable[[RuntimeError], TransportError],
    ) -> None:
        self._flight: tuple[list[_Transfer], Tensor] | None = (transfers, received)
        self._dropped, self._failed = dropped, failed
        _exchanges.add(self)

    def wait(self) -> Tensor:
        """See `Pending.wait`.

        Raises:
            TransportError: the backend failed.
            CommError: it was waited for before.
        """
        if self._flight is None:
            raise CommError("an exchange was waited for twice; keep the result of the first wait")
        (transfers, received), self._flight = self._flight, None
        try:
            _wait_for(transfers)
        except RuntimeError as error:
            raise self._failed(error) from error
        if received.is_cuda:
            received.record_stream(torch.cuda.current_stream())  # a lane's stream has made it
        return received

    def __del__(self) -> None:
        if self._flight is not None:
            self._dropped.append(self._flight[0])

    def transfers(self) -> list[_Transfer]:
        """Those that nobody has waited for."""
        return [] if self._flight is None else self._flight[0]


_transports: "weakref.WeakSet[TorchTransport]" = weakref.WeakSet()
_exchanges: "weakref.WeakSet[_Exchange]" = weakref.WeakSet()
_left: list[tuple[dict[str, Any], deque[list[_Transfer]]]] = []  # backends, and what is under way there


def _let_go(backends: dict[str, Any], dropped: deque[list[_Transfer]]) -> None:
    """The transport is gone: close its communicators, or leave that to the end of the program."""
    if dropped:
        _left.append((dict(backends), dropped))
    backends.clear()


@atexit.register
def _finish_exchanges() -> None:
    """Let exchanges end that nobody waits for; runs after `lane.finish_lanes`, which is registered later."""
    until = end_of_leave()
    left = [*(dropped for _, dropped in _left), *(transport._dropped for transport in list(_transports))]
    forgotten = [transfers for dropped in left for transfers in dropped]
    for transfers in [*forgotten, *(exchange.transfers() for exchange in list(_exchanges))]:
        for work, *_ in transfers:
            try:
                work.wait(timedelta(seconds=max(until - time.monotonic(), 1e-3)))
            except RuntimeError:  # a peer has ended or is late; whoever it matters to has heard of it
                return


def _wait_for(transfers: list[_Transfer]) -> None:
    for work, *_ in transfers:
        work.wait()


class _Kind:
    """A kind of communicator, to open more of.

    Args:
        name: gloo or nccl.
        time_limit: of a collective.
    """

    def __init__(self, name: str, time_limit: timedelta) -> None:
        self.name = name
        self._time_limit = time_limit

    @classmethod
    def of(cls, backend: Any) -> "_Kind":
        """The kind of an open backend."""
        name = backend.name()
        if name not in ("gloo", "nccl"):
            raise PlacementError(f"expected a process group of gloo or nccl, got {name}")
        return cls(name, backend.options._timeout)

    def open(self, store: dist.Store, rank: int, size: int) -> Any:
        """Meet the peers under this store."""
        if self.name == "gloo":
            return dist.ProcessGroupGloo(store, rank, size, self._time_limit)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._time_limit
        return dist.ProcessGroupNCCL(store, rank, size, options)
