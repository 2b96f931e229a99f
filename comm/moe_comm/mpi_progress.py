"""Drives MPI exchanges while the caller computes: one thread for all transports of a process.

MPI moves the parts of a non-blocking collective only inside MPI calls, so an exchange that is started
and left alone stands still. One daemon thread looks at every request under way (`Testsome`), then
sleeps: a sixteenth of the time since something last happened, at most 1 ms, so that it costs a short
exchange little time and a long one little processor. A caller that waits looks for itself, and the
thread leaves it to that, since news handed from thread to thread comes late. It yields for a moment,
which suits exchanges of microseconds, then sleeps between looks, so that ranks that share a core are
not kept from it: beside three of these waits, on two busy cores, a fourth rank computed 1.8 times as
fast as beside three blocking MPI calls, which spin. (No setting of MPICH 5.0 did better;
MPIR_CVAR_POLLS_BEFORE_YIELD at 10 made small exchanges of four ranks a hundred times slower.)

One look may move as little as one cell of 8 KiB through shared memory (MPICH where processes may not
read each other's memory, as in many containers). So a look that moved something is followed by another
at once. MPI does not tell whether it did, but its duration does: 0.6 us for nothing, 2.3 us for a cell
where this was built. That took an exchange of 4 MiB between two ranks from 34 ms to 4 ms.
"""

import atexit
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moe_comm.errors import CommError, TransportError
from moe_comm.lane import finish_lanes
from moe_comm.mpi_lane import Lane, one_line

if TYPE_CHECKING:
    from mpi4py import MPI

_SLEEP_S = 1e-3  # longest sleep between two looks of the thread, or of a rank that leaves
_WAIT_SPIN_S = 5e-5  # for so long a waiting caller only yields between two looks
_WAIT_SLEEP_S = (5e-5, 2e-4)  # then it sleeps, longer as time goes by; the kernel adds some 60 us
_BUSY = 1.6  # a look that took so many times an idle one moved something
_IDLE_GROWTH = 1.0001  # forgets the shortest look of when fewer requests were under way
_LEAVE_S = 5.0  # how long a rank that raised waits for the others to notice


class Exchange:
    """One exchange under way; holds its buffers until it has ended.

    Args:
        progress: what drives it.
        lane: where it was started.
        request: of MPI.
        send: what MPI reads.
        received: what MPI writes, and the result.

    Attributes:
        finished_at: `time.perf_counter()` at the look that saw its end; None before.
    """

    def __init__(
        self, progress: "Progress", lane: Lane, request: "MPI.Request", send: Tensor, received: Tensor
    ) -> None:
        self.lane = lane
        self.request = request
        self.number = lane.started
        self.finished_at: float | None = None
        self._progress = progress
        self._buffers: tuple[Tensor, ...] = (send, received)
        self._failure: str | None = None
        self._was_waited_for = False

    def end(self, failure: str | None = None) -> None:
        """Note that it has ended, and its fault if it has one."""
        self._failure = failure
        self.finished_at = time.perf_counter()

    def wait(self) -> Tensor:
        """Block until it has ended.

        Raises:
            TransportError: MPI failed, or a peer ended without having started it.
            CommError: it was waited for before.
        """
        if self._was_waited_for:
            raise CommError("a pending operation was waited for twice; keep the result of the first wait")
        self._was_waited_for = True
        self._progress.wait(self)
        if self._failure is not None:
            where = f"expert-parallel rank {self.lane.rank} of {self.lane.size}"
            raise TransportError(f"{where}: exchange {self.number} over MPI failed: {self._failure}")
        received = self._buffers[1]
        self._buffers = ()
        return received


class Progress:
    """All exchanges under way in this process, and the thread that drives them.

    Args:
        mpi: the module `mpi4py.MPI`, initialised for any number of threads.
    """

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._changed = threading.Condition()  # its lock guards all below, and every look
        self._lanes: list[Lane] = []
        self._active: list[Exchange] = []
        self._doomed: list[Exchange] = []  # MPI may still write to their buffers: kept for good
        self._num_waiting = 0
        self._last_event = 0.0
        self._idle_look_s = 1.0  # what a look takes that finds nothing to move
        self._is_leaving = False
        self._thread: threading.Thread | None = None
        atexit.register(self._leave)

    def open_lane(self, comm: "MPI.Intracomm") -> Lane:
        """Take charge of a private communicator."""
        lane = Lane(self._mpi, comm)
        with self._changed:
            self._lanes.append(lane)
        return lane

    def close(self, lane: Lane) -> None:
        """Say goodbye on a communicator while the program goes on."""
        with self._changed:
            lane.say_goodbye()

    def drive(self, exchange: Exchange) -> None:
        """Take charge of an exchange that was just started."""
        with self._changed:
            self._active.append(exchange)
            self._last_event = time.perf_counter()
            if self._thread is None and not self._is_leaving:
                self._thread = threading.Thread(target=self._run, name="moe_comm MPI progress", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, exchange: Exchange) -> None:
        """Look until it has ended; several threads may wait at once."""
        if exchange.finished_at is not None:
            return
        with self._changed:
            self._num_waiting += 1
        began = time.perf_counter()
        try:
            while True:
                with self._changed:
                    if exchange.finished_at is None:
                        self._look()
                if exchange.finished_at is not None:
                    return
                waited_s = time.perf_counter() - began
                if waited_s < _WAIT_SPIN_S:
                    os.sched_yield()
                else:
                    time.sleep(min(max(_WAIT_SLEEP_S[0], waited_s / 64), _WAIT_SLEEP_S[1]))
        finally:
            with self._changed:
                self._num_waiting -= 1

    def _run(self) -> None:
        """The thread: look, sleep, and rest while nothing is under way."""
        with self._changed:
            while not self._is_leaving:
                if not self._active:
                    self._changed.wait()
                    continue
                if not self._num_waiting:
                    self._look()
                quiet_s = time.perf_counter() - self._last_event
                self._changed.wait(min(quiet_s / 16, _SLEEP_S))

    def _look(self) -> None:
        """Let MPI move what it can, for 1 ms at most, and note what has ended; the lock is held."""
        until = time.perf_counter() + _SLEEP_S
        while self._active and self._look_once() and time.perf_counter() < until:
            continue

    def _look_once(self) -> bool:
        """Whether this look moved something, as far as its length tells."""
        requests = [exchange.request for exchange in self._active]
        failure: str | None = None
        statuses: list[MPI.Status] = []
        began = time.perf_counter()
        try:
            self._mpi.Request.Testsome(requests, statuses)
        except self._mpi.Exception as error:
            failure = self._describe(error, statuses)
        now = time.perf_counter()
        # Whoever ended in a look that failed is taken to have failed: MPI does not say in which order
        # its statuses come, and promises nothing after an error anyway.
        ended = [e for e in self._active if e.request == self._mpi.REQUEST_NULL]
        for exchange in ended:
            exchange.end(failure)
        if ended:
            self._last_event = now
        elif failure is not None or now - self._last_event > _SLEEP_S:
            self._give_up(failure)
        self._active = [exchange for exchange in self._active if exchange.finished_at is None]
        self._idle_look_s = min(now - began, self._idle_look_s * _IDLE_GROWTH)
        return now - began > _BUSY * self._idle_look_s

    def _give_up(self, failure: str | None) -> None:
        """Fail what can never end: MPI as a whole has failed, or a peer has left without it."""
        try:
            for lane in {exchange.lane for exchange in self._active}:
                lane.hear_goodbyes()
        except self._mpi.Exception as error:
            failure = one_line(str(error))
        for exchange in self._active:
            cause = failure or exchange.lane.why_never(exchange.number)
            if cause is not None:
                exchange.end(cause)
                self._doomed.append(exchange)

    def _describe(self, error: "MPI.Exception", statuses: "list[MPI.Status]") -> str:
        """The error of MPI in one line."""
        codes = [status.Get_error() for status in statuses]
        faults = [code for code in codes if code != self._mpi.SUCCESS]
        in_status = error.Get_error_class() == self._mpi.ERR_IN_STATUS and bool(faults)
        return one_line(self._mpi.Get_error_string(faults[0]) if in_status else str(error))

    def _leave(self) -> None:
        """The end of the interpreter: stop the thread, and see to it that MPI_Finalize cannot hang."""
        finish_lanes()  # what they still have to start comes before the goodbyes
        with self._changed:
            self._is_leaving = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self._mpi.Is_finalized():
            return
        try:
            is_clean = self._part()
        except self._mpi.Exception as error:
            print(f"MPI failed at the end of the program: {one_line(str(error))}", file=sys.stderr)
            is_clean = False
        if not is_clean:
            from mpi4py.run import set_abort_status

            set_abort_status(1)  # in place of MPI_Finalize, after the interpreter's other business

    def _part(self) -> bool:
        """Take leave of all peers; whether MPI_Finalize can then end."""
        has_raised = getattr(sys, "last_value", None) is not None
        began = time.perf_counter()
        with self._changed:
            for lane in self._lanes:
                lane.say_goodbye()
        while not self._all_left():
            if (has_raised or self._doomed) and time.perf_counter() - began > _LEAVE_S:
                return False
            time.sleep(_SLEEP_S)
        return not self._doomed

    def _all_left(self) -> bool:
        """Whether nothing is under way and every peer has left every lane."""
        with self._changed:
            if self._active:
                self._look()
            for lane in self._lanes:
                lane.hear_goodbyes()
            return not self._active and all(lane.is_deserted() for lane in self._lanes)


_opening = threading.Lock()
_shared: list[Progress] = []


def shared_progress(mpi: Any) -> Progress:
    """The one `Progress` of this process."""
    with _opening:
        if not _shared:
            _shared.append(Progress(mpi))
        return _shared[0]
