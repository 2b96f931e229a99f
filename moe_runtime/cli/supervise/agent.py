"""The launcher's agent: torch's own, with what it lacks.

torch's `LocalElasticAgent` meets other agents, numbers the ranks, starts them and ends them. Its loop around
that restarts whatever failed as often as it was told, at once, and gives a hung or deaf rank 30 s; after
a signal it prints a traceback and fails although every rank saved. So the loop is our own:

    meet -> start ranks -> watch -> judge -> meet ...
    `------- Agent.attempt -----'     |
                                      +-- `run.run_ranks`: again, or an outcome

When a rank fails, the others of this machine get a moment to notice it and to say what they saw; then
they are killed. A checkpoint under way is not torn by that: it is whole or not there. torch's records of
failures have whole seconds; who was first is found out here, for the one that ended first is the cause.

Rejected: torch's restart count as the number of an attempt (it differs between machines), and asking ranks
to end with SIGTERM first (one that waits inside gloo for a dead peer does not hear it).
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch.distributed as dist
from torch.distributed.elastic.agent.server.api import Worker, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.rendezvous import RendezvousHandler

from moe_runtime.cli.supervise.hang import HangWatch, Verdict
from moe_runtime.cli.supervise.hang_dump import dump_hang
from moe_runtime.cli.supervise.job import Job
from moe_runtime.cli.supervise.meeting_place import Change, MeetingPlace
from moe_runtime.cli.supervise.outcome import has_stopped
from moe_runtime.cli.supervise.shrink import Shape, fit_shape
from moe_runtime.parallel.heartbeat import ATTEMPT, STATUS_DIR
from moe_runtime.parallel.meeting import TOKEN
from moe_runtime.parallel.world import RANKS_PER_NODE

_LOOK_S = 0.1
_LAST_WORDS_S = 2.0
_MACHINES_S = 0.5
_LAST_SAVE_S = 5.0
_TIDY_TERMINAL = b"\r\x1b[2K\x1b[?25h"  # clear the line, show the cursor


@dataclass(frozen=True)
class End:
    """How the ranks of this machine ended in one attempt.

    Args:
        attempt: its number, from 1.
        status_dir: what the ranks left.
        failed: exit codes of ranks that failed by themselves, negative for a signal; empty if all ended well.
        stopped: ranks ended well before the end of the run.
        change: of the machines, because of which ranks were ended.
        hang: the rank that held the others up, because of which all were ended.
    """

    attempt: int
    status_dir: Path
    failed: Mapping[int, int] = field(default_factory=dict)
    stopped: bool = False
    change: Change | None = None
    hang: Verdict | None = None


class Agent(LocalElasticAgent):
    """Runs attempts on this machine.

    Args:
        job: what every rank runs.
        meeting: gives the ranks of each attempt their store.
        scratch: a folder for what ranks leave.
    """

    def __init__(self, job: Job, meeting: MeetingPlace, scratch: Path) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=job.ranks,
            entrypoint=sys.executable,
            args=job.arguments(1),
            rdzv_handler=cast(RendezvousHandler, meeting),
            max_restarts=0,
            monitor_interval=_LOOK_S,
        )
        super().__init__(spec, logs_specs=DefaultLogsSpecs(log_dir=str(scratch / "logs")))
        self._job, self._meeting, self._scratch = job, meeting, scratch
        self._folder = scratch
        self.shape: Shape | None = None

    def attempt(self, begins: Callable[[], None]) -> End:
        """Meet, start all ranks, and wait until none of them lives.

        Args:
            begins: called when ranks have been started.

        Raises:
            RendezvousError: the machines did not meet.
        """
        try:
            self._initialize_workers(self._worker_group)
            begins()
            return self._watch()
        finally:
            self._kill()

    @property
    def machines(self) -> int:
        """In the present round."""
        return self._worker_group.group_world_size or 0

    def _assign_worker_ranks(
        self, store: dist.Store, group_rank: int, group_world_size: int, spec: WorkerSpec
    ) -> list[Worker]:
        """Number the ranks; where machines are missing, those beyond the shrunk layout stand by."""
        available = group_world_size * self._job.ranks
        config = self._job.config
        self.shape = None if config is None else fit_shape(config, available)
        world_size = available if self.shape is None else self.shape.world_size
        first = group_rank * self._job.ranks
        mine = range(first, min(first + self._job.ranks, world_size))
        return [Worker(rank - first, rank, rank, world_size, world_size) for rank in mine]

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Start the ranks as torch does, with what this attempt has of its own."""
        number = self._meeting.attempt
        # Not by the attempt's number, which begins anew when machine 0 does.
        self._folder = Path(tempfile.mkdtemp(prefix="ranks", dir=self._scratch))
        self._pcontext = None
        if not worker_group.workers:
            return {}
        # Ranks take over this process's environment.
        per_node = min(self._job.ranks, worker_group.workers[0].world_size)
        os.environ |= {STATUS_DIR: str(self._folder), ATTEMPT: str(number), RANKS_PER_NODE: str(per_node)}
        os.environ[TOKEN] = self._meeting.token
        spec = worker_group.spec
        spec.args = self._job.arguments(number, self._overrides())
        spec.local_world_size = len(worker_group.workers)
        pids: dict[int, int] = super()._start_workers(worker_group)
        return pids

    def _overrides(self) -> tuple[str, ...]:
        """What a shrunk run has other than its config."""
        config, shape = self._job.config, self.shape
        if config is None or shape is None or shape.dp == config.layout.dp:
            return ()
        return (f"layout.dp={shape.dp}",)

    def _watch(self) -> End:
        number, folder = self._meeting.attempt, self._folder
        machines, hangs = _MachinesWatch(self._meeting), self._hang_watch(folder)
        while True:
            time.sleep(_LOOK_S)
            codes = self._codes()
            if any(codes.values()):
                failed = self._last_words()
                if machines.asked:  # one that was still starting ends by the signal
                    failed = {rank: code for rank, code in failed.items() if code != -signal.SIGTERM}
                return End(number, folder, failed, change=machines.change)
            if all(code == 0 for code in codes.values()):
                return End(number, folder, stopped=has_stopped(folder), change=machines.change)
            if hangs is not None and (verdict := hangs.look()) is not None:
                self._dump(hangs, verdict)
                return End(number, folder, hang=verdict)
            if machines.look():
                return End(number, folder, change=machines.change)
            if machines.asks_to_stop():
                self._ask_to_stop()

    def _hang_watch(self, folder: Path) -> HangWatch | None:
        """Of this attempt; only training has heartbeats."""
        config, workers = self._job.config, self._worker_group.workers
        if config is None or self._pcontext is None:
            return None
        pids = {workers[local].global_rank: pid for local, pid in self._pcontext.pids().items()}
        size = workers[0].world_size
        return HangWatch(folder, pids, config.reliability, config.train.watchdog_s, size)

    def _dump(self, watch: HangWatch, verdict: Verdict) -> None:
        """Keep what is known of a hang; a full disk does not keep the run from its restart."""
        if self._job.run_dir is None:
            return
        into = self._job.run_dir / "hangs" / f"attempt{self._meeting.attempt}-rank{verdict.rank}"
        try:
            dump_hang(watch, verdict, into, self._job.reliability.heartbeat_s)
        except OSError as error:
            print(f"{into}: {error.strerror}", file=sys.stderr, flush=True)

    def _ask_to_stop(self) -> None:
        """Let the ranks save and leave."""
        assert self._pcontext is not None
        for pid in self._pcontext.pids().values():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _last_words(self) -> dict[int, int]:
        """Exit codes of all ranks that fail by themselves within a moment of the first one."""
        until = time.monotonic() + _LAST_WORDS_S
        while None in (codes := self._codes()).values() and time.monotonic() < until:
            time.sleep(_LOOK_S)
        return {rank: code for rank, code in codes.items() if code}

    def _codes(self) -> dict[int, int | None]:
        """The exit code of each rank of this machine by its global number; None while it lives."""
        if self._pcontext is None:  # a machine that stands by
            return {}
        assert isinstance(self._pcontext, SubprocessContext)
        workers = self._worker_group.workers
        handlers = self._pcontext.subprocess_handlers
        return {workers[local].global_rank: each.proc.poll() for local, each in handlers.items()}

    def _kill(self) -> None:
        """End what still lives, each rank with all that it started."""
        if self._pcontext is None:
            return
        for pid in self._pcontext.pids().values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._shutdown(signal.SIGKILL)
        if sys.stdout.isatty():  # rank 0 drew a bar there, and may have had no time to take it away
            os.write(sys.stdout.fileno(), _TIDY_TERMINAL)


class _MachinesWatch:
    """Looks now and then whether machines came or went while ranks run.

    Attributes:
        change: what was seen last.
        asked: ranks were asked to stop.
    """

    def __init__(self, meeting: MeetingPlace) -> None:
        self._meeting = meeting
        self._next_s = self._lost_s = 0.0
        self.asked = False
        self.change: Change | None = None

    def look(self) -> bool:
        """Whether ranks cannot go on.

        When machine 0 went, its ranks are told by the kernel: all may be saving, and get the time for it.
        """
        now = time.monotonic()
        if now < self._next_s:
            return False
        self._next_s = now + _MACHINES_S
        self.change = self._meeting.changed()
        if self.change is not Change.LOST:
            self._lost_s = 0.0
            return self.change in (Change.LEFT, Change.CLOSED)
        self._lost_s = self._lost_s or now
        return now - self._lost_s > _LAST_SAVE_S

    def asks_to_stop(self) -> bool:
        """Whether ranks should save and leave, to go on with one more machine; true once."""
        if self.asked or self.change is not Change.CAME:
            return False
        self.asked = True
        return True
