"""An average of the weights over training steps, in host memory, off the critical path. Ref: DSV3 §3.2.3.

    average <- decay x average + (1 - decay) x weights        after every step, from the initial weights on

It tells early how good a model would be after the learning rate has decayed, at no cost of device memory
or time: what a step has left is copied and averaged while the next step computes, and only the next
*update* waits for that. Each rank averages what it would write into a checkpoint, so every parameter is
averaged once in the whole run, under its own name, and an average says nothing of the layout that made it.

The weights are averaged, not the FP32 masters: masters are cut by the optimizer's partitions, which a
reader of another layout could not put together without them. BF16 weights round each step, but an average
over hundreds of differently rounded steps is closer to the masters than one rounding; it is kept in FP32.

On a GPU the copy is a transfer to pinned memory on a stream of its own (2 bytes a BF16 parameter of host
memory beside the average's 4); on a CPU the thread reads the weights where they are.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from moe_runtime.errors import CheckpointError


class HostEma:
    """The average of a set of tensors.

    Args:
        weights: name -> live tensor, which steps change in place; of any floating type and device. The
            average begins as their values.
        decay: at least 0, which follows the weights exactly, and below 1.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._weights = {name: tensor.detach() for name, tensor in weights.items()}
        self._average: dict[str, Tensor] = {}
        self._staged: dict[str, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ema")
        self._running: Future[None] | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """Let the average be the weights as they are now."""
        self.join()
        self._average = {
            name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in self._weights.items()
        }

    def start(self) -> None:
        """Take the weights into the average in the background; `join` before they change."""
        self.join()
        arrived = self._stage()
        self._running = self._worker.submit(self._update, arrived)

    def join(self) -> None:
        """Wait until the weights may change; raises what the background work raised."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def tensors(self) -> dict[str, Tensor]:
        """Name -> average, FP32 on the CPU, live until the next `start`."""
        self.join()
        return dict(self._average)

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Take a saved average, bit for bit.

        Raises:
            CheckpointError: a name is missing or of another shape; nothing has been changed then.
        """
        self.join()
        for name, own in self._average.items():
            if name not in saved or saved[name].shape != own.shape:
                got = list(saved[name].shape) if name in saved else "nothing"
                raise CheckpointError(f"average of {name}: expected {list(own.shape)}, got {got}")
        for name, own in self._average.items():
            own.copy_(saved[name])

    def _stage(self) -> torch.cuda.Event | None:
        """On a GPU: send the weights to the host; gives what says that they have arrived."""
        on_gpu = {name: tensor for name, tensor in self._weights.items() if tensor.is_cuda}
        if not on_gpu:
            return None
        if self._stream is None:
            self._stream = torch.cuda.Stream()
            self._staged = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
                for name, tensor in on_gpu.items()
            }
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for name, tensor in on_gpu.items():
                self._staged[name].copy_(tensor, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record(self._stream)
        return arrived

    @torch.no_grad()
    def _update(self, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        for name, tensor in self._weights.items():
            source = self._staged.get(name, tensor)
            self._average[name].lerp_(source.to(torch.float32), 1 - self.decay)
