"""Who failed first, where it was, and what kind of failure that is: for the journal, for people, for scores.

The kinds, from the surest sign to the weakest:

    stopped, silent, stuck, deadlock    the hang watch's verdict
    killed, terminated, crashed         ended by SIGKILL, by SIGTERM, by any other signal
    exited                              ended with a code and not a word
    error, memory, mistake              said so itself: a defect, memory that ended, a user's mistake
    lost_peer                           every rank only lost another, which was elsewhere, or the network

Where it was is its last mark, which outlives it in its heartbeat file.
"""

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.cli.supervise.hang import Verdict, microbatch_of
from moe_runtime.cli.supervise.outcome import Outcome
from moe_runtime.parallel.beat import Beat, read_beat
from moe_runtime.train.inject import phases_of

_BY_SIGNAL = {signal.SIGKILL: "killed", signal.SIGTERM: "terminated"}
_WORDLESS = ("killed", "terminated", "crashed", "exited")
_BY_CODE = {1: "error", 2: "mistake", 3: "lost_peer", 4: "memory"}


@dataclass(frozen=True)
class Blame:
    """The cause of a failed attempt.

    Args:
        rank: global; None: it is none of this machine's.
        kind: see above.
        step: under way, from 1; 0 before the first, or unknown.
        phase: as `train --inject` names phases; empty if unknown.
        action: entry and part, such as `3F5, dispatch layers.3`.
        microbatch: None outside of a program.
        writes: point of a checkpoint that was being written meanwhile; empty if none was.
    """

    rank: int | None
    kind: str
    step: int = 0
    phase: str = ""
    action: str = ""
    microbatch: int | None = None
    writes: str = ""

    def fields(self) -> dict[str, Any]:
        """For an event."""
        place = {"at_step": self.step, "phase": self.phase, "action": self.action}
        return {"rank": self.rank, "fault": self.kind, **place, "microbatch": self.microbatch}

    def tell(self, cause: str) -> str:
        """A cause with the place where it struck, if the cause does not know that by itself."""
        if self.kind not in _WORDLESS or not self.phase:
            return cause
        step = f"step {self.step}" if self.step else ""
        words = ", ".join(filter(None, (step, self.phase, self.action)))
        return f"{cause} in {words}" + ", while a checkpoint was written" * bool(self.writes)


def find_blame(
    outcome: Outcome,
    failed: Mapping[int, int],
    statuses: Mapping[int, Mapping[str, Any]],
    hang: Verdict | None,
    status_dir: Path,
) -> Blame:
    """The cause of a failed attempt.

    Args:
        outcome: made of the same signs; its rank is the one to blame.
        failed: exit codes of ranks that failed by themselves.
        statuses: what ranks wrote before they ended.
        hang: the rank that held the others up, if that was it.
        status_dir: of the attempt; has the heartbeats.
    """
    rank = outcome.rank
    if rank is None:
        return Blame(None, "lost_peer")
    kind = hang.kind if hang is not None else _kind(failed.get(rank, 0), statuses.get(rank))
    if kind == "lost_peer":
        return Blame(None, kind)
    beat = read_beat(status_dir / f"rank{rank}.heartbeat")
    if beat is None:
        return Blame(rank, kind)
    phase = phase_of(beat)
    return Blame(rank, kind, beat.step, phase, beat.action, microbatch_of(beat.action), beat.writes)


def phase_of(beat: Beat) -> str:
    """The most exact name of the phase that a rank was in."""
    if beat.phase == "start":
        return "init"
    named = phases_of(beat)
    return named[-1] if named else beat.phase


def _kind(code: int, status: Mapping[str, Any] | None) -> str:
    if status is not None:
        return _BY_CODE.get(status["code"], "error")
    return _BY_SIGNAL.get(signal.Signals(-code), "crashed") if code < 0 else "exited"
