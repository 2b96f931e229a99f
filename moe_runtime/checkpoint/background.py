"""Checkpoints written behind the training: the rank stands still for a copy in memory, no longer.

    training thread   step N | copy | step N+1 | step N+2 | ...
    writing thread                  | write, fsync, read back | agree | rename |

One save at a time. When the next is due and one still runs, the rank waits for it and says for how long:
a checkpoint dropped in silence would be missed on the day it is needed, and a queue would need memory for
a second copy. So a kill costs the steps since the last checkpoint that is *on disk*: at most an interval
and what passed while the next was being written.

All ranks save the same steps in the same order, so their writing threads make the same collectives in the
same order, over a process group of their own. Whatever fails in writing is agreed upon there and comes back
as a `SaveFailed`. A collective that fails itself (a rank died) raises in the training thread, at the next
`take` or `wait`; the thread is a daemon, so a write that hangs keeps no process alive.

Rejected: a process that writes. It would be free of the interpreter's lock, which costs the training
thread a few milliseconds a checkpoint, but it has to import torch, be watched, and be ended in every way
that a rank can end; and it would take the snapshot through shared memory, whose size containers limit.
"""

import threading
import time
from dataclasses import dataclass

from moe_runtime.checkpoint.folder import Found
from moe_runtime.checkpoint.snapshot import HostCopy, Snapshot
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveFailed, SaveMeta

_LOOK_S = 0.2


@dataclass(frozen=True)
class SaveReport:
    """How one save went.

    Args:
        step: optimizer steps done.
        outcome: the same on every rank.
        blocked_s: the training thread stood still for the copy; the longest of all ranks.
        write_s: from the copy until the checkpoint was on disk.
    """

    step: int
    outcome: Saved | SaveFailed
    blocked_s: float
    write_s: float


class BackgroundSaver:
    """Saves of one run, each on a thread beside the rank's own.

    Args:
        store: over a process group that nothing else uses.
    """

    def __init__(self, store: CheckpointStore) -> None:
        self.store = store
        self._copy = HostCopy()
        self._running: _Save | None = None

    @property
    def running_step(self) -> int | None:
        """The step whose save is not taken yet."""
        return None if self._running is None else self._running.step

    def start(self, step: int, own: Contribution, meta: SaveMeta, since: float | None = None) -> None:
        """Copy what is to be saved and write it behind; the save before must have been taken.

        Args:
            step: optimizer steps done.
            own: live tensors, which may change as soon as this returns.
            meta: what the manifest says about the run.
            since: `time.perf_counter()` from which the training thread counts as blocked; None: now.
        """
        assert self._running is None, f"step {step}: the save of step {self.running_step} is not taken"
        begun = time.perf_counter() if since is None else since
        snapshot = self._copy.take(own)
        self._running = _Save(self.store, step, snapshot, meta, time.perf_counter() - begun)

    def take(self) -> SaveReport | None:
        """The report of a save that has ended; None if none has. Never waits.

        Raises:
            RuntimeError: a collective of the save failed, most likely because a rank died.
        """
        return None if self._running is None or self._running.is_alive else self.wait()

    def wait(self) -> SaveReport | None:
        """Wait for the save that runs; None if none does.

        Raises:
            RuntimeError: a collective of the save failed, most likely because a rank died.
        """
        try:
            return None if self._running is None else self._running.result()
        finally:
            self._running = None

    def latest_good(self) -> Found:
        """The newest checkpoint that verifies, alike on every rank; no save may be running."""
        assert self._running is None, f"the save of step {self.running_step} is not taken"
        return self.store.latest_good()


class _Save:
    """One save on its thread."""

    def __init__(
        self, store: CheckpointStore, step: int, snapshot: Snapshot, meta: SaveMeta, blocked_s: float
    ) -> None:
        self.step = step
        self._store, self._snapshot, self._meta, self._blocked_s = store, snapshot, meta, blocked_s
        self._outcome: SaveReport | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"save of step {step}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> SaveReport:
        """Wait for the end.

        A disk that hangs on one rank lets all others wait for it in their writing threads. The stack of this
        thread says which of both it is, so that whoever looks for the culprit finds the one.
        """
        while self._thread.is_alive():
            if self._store.waits_for_others:
                self._store.peers.stand_by(self._thread, _LOOK_S)
            else:
                self._thread.join(_LOOK_S)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        assert self._outcome is not None
        return self._outcome

    def _run(self) -> None:
        begun = time.perf_counter()
        try:
            outcome = self._store.save(self.step, self._snapshot.wait(), self._meta)
            blocked_s = max(self._store.peers.gather_json(self._blocked_s))
            self._outcome = SaveReport(self.step, outcome, blocked_s, time.perf_counter() - begun)
        except BaseException as error:  # raised again where the rank's own thread asks
            self._outcome = error
        finally:
            self._store.at("")
