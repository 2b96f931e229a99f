"""Whether a run goes on, and if not, how it ended: told by its events and by the process that holds its
folder.

The lock itself is not tried: to hold it for an instant could turn away a run that starts in that instant.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from moe_runtime.metrics.report.shown import as_text

_LOCK_FILE = ".lock"  # made by train.run_lock, a floor above: "PID on HOST"
_ENDS = {"finished": "finished", "stopped": "stopped", "preempted": "stopped", "fault": "failed"}
_BEGINS = ("attempt", "resume")


@dataclass(frozen=True)
class RunState:
    """Args:
    word: for a badge.
    sentence: what is known.
    """

    word: Literal["running", "finished", "stopped", "failed", "not running", "not begun"]
    sentence: str


def run_state(run_dir: Path, events: Sequence[dict[str, Any]], last_step: int) -> RunState:
    """The state of a run, as far as its folder tells."""
    holder = _living_holder(run_dir / _LOCK_FILE)
    if holder is not None:
        return RunState("running", f"process {holder} is training in this folder")
    last = next((event for event in reversed(events) if event["kind"] in (*_ENDS, *_BEGINS)), None)
    if last is not None and last["kind"] in _ENDS:
        step = last.get("step")
        at = f" after step {step:,}" if type(step) is int else ""
        message = f": {as_text(last['message'])}" if "message" in last else ""
        return RunState(_ENDS[last["kind"]], f"{last['kind']}{at}{message}")  # type: ignore[arg-type]
    if not last_step and last is None:
        return RunState("not begun", "no step has been recorded yet")
    return RunState(
        "not running", f"no process of this machine trains in it; last record: step {last_step:,}"
    )


def age_of(time: str) -> float | None:
    """Seconds since a time of events.jsonl; None if it is none."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds()
    except (ValueError, TypeError):
        return None


def _living_holder(lock: Path) -> int | None:
    """The process that has the lock file open, by its own word; None if none of this machine has."""
    try:
        pid, _, host = lock.read_text().strip().partition(" on ")
        files = Path("/proc") / str(int(pid)) / "fd"
        if host != os.uname().nodename:
            return None
        held = lock.stat()
        for file in files.iterdir():
            if _is_same(file, held):
                return int(pid)
    except PermissionError:  # another user's process, which is there
        return int(pid)
    except (OSError, ValueError):
        return None
    return None


def _is_same(file: Path, held: os.stat_result) -> bool:
    try:
        return os.path.samestat(file.stat(), held)
    except OSError:  # closed meanwhile, or no file at all
        return False
