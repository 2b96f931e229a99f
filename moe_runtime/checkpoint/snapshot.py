"""A copy in host memory of what a rank saves, taken while nothing changes it.

The buffers are made once and filled again at every checkpoint: memory that the system has to hand out and
clear costs several times the copy itself. They take as much host memory as this rank's files take on disk.

From a GPU the copies are queued behind the work already queued, into pinned memory; later work on the
same stream waits for them, this rank's own thread does not. Whoever reads the buffers waits first.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moe_runtime.checkpoint.store import Contribution


@dataclass(frozen=True)
class Snapshot:
    """A contribution that no step changes.

    Args:
        own: its tensors lie in buffers of a `HostCopy`, until the next one is taken.
        arrived: of the copies from a GPU; None where there is none.
    """

    own: Contribution
    arrived: torch.cuda.Event | None = None

    def wait(self) -> Contribution:
        """The contribution, when all of it has arrived."""
        if self.arrived is not None:
            with torch.cuda.device(self.arrived.device):  # a new thread stands on GPU 0, whoever's that is
                self.arrived.synchronize()
        return self.own


class HostCopy:
    """The buffers of one rank."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, own: Contribution) -> Snapshot:
        """Copy what a contribution refers to; the snapshot before must no longer be in use.

        Args:
            own: of live tensors, on any device.
        """
        copied = Contribution(
            self._copy("weights", own.weights),
            [
                replace(part, tensors=self._copy(f"optimizer.{part.group}", part.tensors))
                for part in own.partitions
            ],
            dict(own.extras),
            self._copy("ema", own.ema),
        )
        live = [*own.weights.values(), *own.optimizer().values(), *own.ema.values()]
        if not any(tensor.is_cuda for tensor in live):
            return Snapshot(copied)
        arrived = torch.cuda.Event()
        arrived.record()
        return Snapshot(copied, arrived)

    def _copy(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copied = {}
        for name, tensor in tensors.items():
            buffer = self._buffer(f"{kind}/{name}", tensor)
            copied[name] = buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        return copied

    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        """The buffer of a tensor, made anew where it has another form than before."""
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer
