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

What ranks agree on (a refusal, an overflow) leaves a group in step, and the next task runs. Any other
failure does not: peers wait for rows that will never come. So it trips the `Breaker`: the group's
transports are given up, which peers notice, and all later operations here fail at once.

When the interpreter ends, lanes first carry out what they were given, since a thread that asks for the
interpreter afterwards would abort the process.

Rejected: callbacks on the transport's own threads (their order is that of completion, which differs
between ranks); coroutines that the caller must poll (nothing moves during a long matrix product).
"""

import atexit
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from moe_comm.errors import CommError, TransportError
from moe_comm.transport import Transport
from moe_comm.wire.carried import tiles_of

T = TypeVar("T")
_LEAVE_S = {True: 5.0, False: 30.0}  # how long lanes may take at the end; of a program that raised, or not


class Breaker:
    """Gives a group up when a task fails in a way that its ranks have not agreed on.

    Args:
        transports: of the group.

    Attributes:
        cause: what failed first; None while all is well.
    """

    def __init__(self, transports: Iterable[Transport] = ()) -> None:
        self._transports = tuple(transports)
        self.cause: BaseException | None = None

    def trip(self, cause: BaseException) -> None:
        """Note the cause and close the transports; further calls do nothing."""
        if self.cause is None:
            self.cause = cause
            for transport in self._transports:
                transport.close()

    def require_whole(self) -> None:
        """Refuse to go on after a failure.

        Raises:
            TransportError: names the cause.
        """
        if self.cause is not None:
            raise TransportError(
                f"communication was given up when an operation failed here ({type(self.cause).__name__}: "
                f"{self.cause}); open a new dispatcher on all ranks"
            )


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

    def run(self, breaker: Breaker) -> None:
        """Carry it out; called once, by the lane."""
        work, self._work = self._work, None
        assert work is not None
        try:
            breaker.require_whole()
            with torch.no_grad():
                value = work()
                del work  # before its end is told: who waits for that may count on its buffers being free
                if torch.cuda.is_available() and torch.cuda.is_initialized():
                    self._event = torch.cuda.current_stream().record_event()
        except BaseException as error:
            is_agreed = isinstance(error, CommError) and not isinstance(error, TransportError)
            if not is_agreed:
                breaker.trip(error)
            # The frames of a refusal hold the whole input, and tell its reader nothing.
            self._done.set_exception(error.with_traceback(None) if is_agreed else error)
        else:
            self._done.set_result(value)


class Lane:
    """Runs tasks one after another on a thread that lives as long as the lane.

    Args:
        name: of the thread.
        breaker: shared by the lanes of a group.
    """

    def __init__(self, name: str, breaker: Breaker | None = None) -> None:
        self._name = name
        self._breaker = Breaker() if breaker is None else breaker
        self._tasks: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._is_running = False
        self._stream: torch.cuda.Stream | None = None

    def submit(self, work: Callable[[], T], device: torch.device, reads: Sequence[Tensor] = ()) -> Job[T]:
        """Queue a task; returns at once.

        Args:
            work: runs without gradients; on CUDA after all that the caller has queued so far.
            device: where it works.
            reads: tensors of the caller that it reads.
        """
        if not self._is_running:
            self._is_running = True
            self._start()
        job = Job(self._on_stream(work, device, reads) if device.type == "cuda" else work)
        self._tasks.put(job)
        return job

    def _start(self) -> None:
        thread = threading.Thread(
            target=_serve, args=(self._tasks, self._breaker), name=self._name, daemon=True
        )
        if not _running:
            atexit.unregister(finish_lanes)
            atexit.register(finish_lanes)
        _running[thread] = self._tasks
        thread.start()
        weakref.finalize(self, self._tasks.put, None)

    def _on_stream(
        self, work: Callable[[], T], device: torch.device, reads: Sequence[Tensor]
    ) -> Callable[[], T]:
        stream = self._stream = self._stream or torch.cuda.Stream(device)
        for tensor in reads:
            for part in (tensor, *(tiles_of(tensor) or ())):
                part.record_stream(stream)  # the caller may let go of it before it has been read
        ready = torch.cuda.current_stream(device).record_event()

        def run() -> T:
            torch.cuda.set_device(device)
            torch.cuda.set_stream(stream)
            stream.wait_event(ready)
            return work()

        return run


_running: "weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[Job | None]]" = (
    weakref.WeakKeyDictionary()
)


def _serve(tasks: "queue.SimpleQueue[Job | None]", breaker: Breaker) -> None:
    while (job := tasks.get()) is not None:
        job.run(breaker)
        del job  # a finished task must not hold its buffers until the next one comes


@cache
def end_of_leave() -> float:
    """Until when, by `time.monotonic`, a program that ends may wait for its operations; counted once."""
    return time.monotonic() + _LEAVE_S[getattr(sys, "last_value", None) is not None]


def finish_lanes() -> None:
    """Let all lanes carry out what they were given, and end; called when the interpreter ends."""
    until = end_of_leave()
    running = list(_running.items())
    for _, tasks in running:
        tasks.put(None)
    for thread, _ in running:
        thread.join(max(until - time.monotonic(), 0.0))


def _keep_until_used(value: Any) -> None:
    """Tell the allocator that this stream reads tensors which another stream made."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream())
    elif isinstance(value, tuple | list):
        for part in value:
            _keep_until_used(part)
    elif is_dataclass(value):
        for field in fields(value):
            _keep_until_used(getattr(value, field.name))
