"""The transport over torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

gloo moves bytes on threads of its own, NCCL on a stream of its own, so either works while the caller
computes. On CUDA, waiting makes the current stream wait, not the host.

The group is held weakly: torch owns it until `destroy_process_group`. A gloo group that outlives that
call still has its threads when the interpreter shuts down, and one of them, letting go of a tensor at
that moment, aborts the process ("terminate called without an active exception"; about one exit in ten).
"""

import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from moe_comm.dispatcher import Pending
from moe_comm.errors import PlacementError, TransportError
from moe_comm.pending import Started


class TorchTransport:
    """All-to-all over a process group.

    Args:
        group: the expert-parallel group; None is the default group.

    Raises:
        PlacementError: no process group has been set up, or this rank is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise PlacementError(
                "alltoall needs torch.distributed; call init_process_group first, or use kind 'local'"
            )
        group = dist.distributed_c10d._get_default_group() if group is None else group
        self._group = weakref.ref(group)
        self._rank = dist.get_rank(group)
        self._size = dist.get_world_size(group)
        if self._rank < 0:
            raise PlacementError(f"global rank {dist.get_rank()} is not in the expert-parallel group given")
        on_host = any(device.type == "cpu" for device in group._device_types)
        self._device = torch.device("cpu") if on_host else torch.device("cuda", torch.cuda.current_device())

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
        """See `Transport.split`: a process group of its own, with the time limit of this one."""
        group = self._alive()
        members = [dist.get_global_rank(group, rank) for rank in ranks]
        limit = group._get_backend(self._device).options._timeout
        return TorchTransport(dist.new_group(members, timeout=limit, use_local_synchronization=True))

    def all_to_all(
        self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]
    ) -> Pending[Tensor]:
        """See `Transport.all_to_all`.

        Raises:
            TransportError: here or in the wait, when the backend fails or the group is gone.
        """
        group = self._alive()
        received = torch.empty((sum(recv_splits), *send.shape[1:]), dtype=send.dtype, device=send.device)
        try:
            work = dist.all_to_all_single(
                received, send, list(recv_splits), list(send_splits), group=group, async_op=True
            )
        except RuntimeError as error:
            raise self._failed(error) from error

        def finish(keep_alive: Tensor = send) -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise self._failed(error) from error
            return received

        return Started(finish)

    def _alive(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise TransportError(f"the process group of expert-parallel rank {self._rank} was destroyed")
        return group

    def _failed(self, error: RuntimeError) -> TransportError:
        cause = str(error).strip().split("\n")[0].split(". ")[0]
        return TransportError(
            f"expert-parallel rank {self._rank} of {self._size}: an all-to-all failed ({cause}); "
            "look for a peer that died or stopped"
        )
