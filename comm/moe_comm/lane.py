"""A lane: a thread that carries out the communication tasks of one group, in the order they were given.

Why a thread at all: an exchange in several stages (counts, then rows; first hop, then second) needs
somebody to start the next stage when the one before has ended, and the caller is busy computing. Why
one thread with a queue for each group, not one task for each operation: a group's collectives must
begin in the same order on every rank. An operation puts its tasks into every lane it needs at the
moment of the call, so the order in each lane is the order of the calls, whatever the timing. A task
may wait for a task of the same operation in another lane, never for one of a later operation, so
lanes cannot block each other for ever.

On CUDA a lane has a stream of its own: its kernels neither delay the caller's nor run before what the
caller had queued when it called.

Rejected: callbacks on the transport's own threads (their order is that of completion, which differs
between ranks); coroutines that the caller must poll (nothing moves during a long matrix product).
"""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Job(Generic[T]):
    """A task given to a lane."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work: Callable[[], T] | None = work
        self._done: Future[T] = Future()
        self._event: Any = None

    def wait(self) -> T:
        """Its result, from any thread, any number of times; raises what it raised."""
        value = self._done.result()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            _keep_until_used(value)
        return value

    def run(self) -> None:
        """Carry it out; called once, by the lane."""
        work, self._work = self._work, None
        assert work is not None
        try:
            with torch.no_grad():
                value = work()
                if torch.cuda.is_available() and torch.cuda.is_initialized():
                    self._event = torch.cuda.current_stream().record_event()
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(value)


class Lane:
    """Runs tasks one after another on a thread that lives as long as the lane.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._is_running = False
        self._stream: torch.cuda.Stream | None = None

    def submit(self, work: Callable[[], T], device: torch.device) -> Job[T]:
        """Queue a task; returns at once.

        Args:
            work: runs without gradients; on CUDA after all that the caller has queued so far.
            device: of the tensors that it reads.
        """
        if not self._is_running:
            self._is_running = True
            threading.Thread(target=_serve, args=(self._tasks,), name=self._name, daemon=True).start()
            weakref.finalize(self, self._tasks.put, None)
        job = Job(self._on_stream(work, device) if device.type == "cuda" else work)
        self._tasks.put(job)
        return job

    def _on_stream(self, work: Callable[[], T], device: torch.device) -> Callable[[], T]:
        stream = self._stream = self._stream or torch.cuda.Stream(device)
        ready = torch.cuda.current_stream(device).record_event()

        def run() -> T:
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
            stream.wait_event(ready)
            return work()

        return run


def _serve(tasks: "queue.SimpleQueue[Job | None]") -> None:
    while (job := tasks.get()) is not None:
        job.run()
        del job  # a finished task must not hold its buffers until the next one comes


def _keep_until_used(value: Any) -> None:
    """Tell the allocator that this stream reads tensors which another stream made."""
    if isinstance(value, Tensor) and value.is_cuda:
        value.record_stream(torch.cuda.current_stream())
    elif isinstance(value, tuple | list):
        for part in value:
            _keep_until_used(part)
