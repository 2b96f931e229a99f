"""One outcome from the ends of many ranks: the cause before its consequences.

A rank that fails writes `rank{R}.json` with its exit code and message into the folder named by
MOE_RUNTIME_STATUS_DIR and prints nothing, so that one mistake is one line and not one for each rank.
"""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.parallel.heartbeat import STATUS_DIR

_AGAIN = "train resumes from the last checkpoint by the same command"
_STOPPED = "stopped"
_CAUSES_FIRST = (4, 2, 5, 3)  # memory ended, a mistake, an alert, a lost peer


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this machine ended.

    Args:
        code: exit code of the launcher.
        cause: what happened; empty if all is well.
        remedy: what the user can do, if it is not done for him.
        rank: the one that the cause lies with; None if that is not known.
    """

    code: int
    cause: str = ""
    remedy: str = ""
    rank: int | None = None

    @property
    def message(self) -> str:
        """What the user should read."""
        return f"{self.cause}; {self.remedy}" if self.remedy else self.cause


def leave_status(rank: str, code: int, message: str) -> bool:
    """Tell the launcher why this rank fails; False if no launcher of ours listens."""
    folder = os.environ.get(STATUS_DIR)
    if folder:
        Path(folder, f"rank{rank}.json").write_text(json.dumps({"code": code, "message": message}))
    return bool(folder)


def leave_stopped(rank: int) -> None:
    """Tell the launcher that this rank saved and ends before the run's end, as it was asked to."""
    if STATUS_DIR in os.environ:
        Path(os.environ[STATUS_DIR], f"rank{rank}.{_STOPPED}").touch()


def has_stopped(folder: Path) -> bool:
    """Whether ranks that ended well did so before the end of the run."""
    return any(folder.glob(f"rank*.{_STOPPED}"))


def read_statuses(folder: Path) -> dict[int, dict[str, Any]]:
    """What failed ranks left: `{"code": int, "message": str}` by global rank."""
    return {
        int(file.stem.removeprefix("rank")): json.loads(file.read_text())
        for file in sorted(folder.glob("rank*.json"))
    }


def explain_end(
    failures: Mapping[int, int], statuses: Mapping[int, Mapping[str, Any]], interrupted: bool
) -> Outcome:
    """Why an attempt failed.

    A killed rank comes first, then a defect, then ended memory, then a user's mistake, then a lost peer: the
    later ones may be what other ranks say of one that went for an earlier reason.

    Args:
        failures: exit codes of ranks that failed by themselves, negative for a signal.
        statuses: what ranks wrote before they ended.
        interrupted: the user had asked to stop.
    """
    silent = {rank: code for rank, code in sorted(failures.items()) if rank not in statuses}
    by_code = {
        status["code"]: (rank, status["message"]) for rank, status in sorted(statuses.items(), reverse=True)
    }
    if interrupted and 1 not in by_code:
        return Outcome(130, "stopped before the end of the step; the last checkpoint stands")
    for rank, code in silent.items():
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return Outcome(3, f"rank {rank} was ended by {signal.Signals(-code).name}{hint}", _AGAIN, rank)
    if 1 in by_code:
        rank, message = by_code[1]
        return Outcome(1, f"rank {rank}: {message}", rank=rank)
    for rank, code in silent.items():
        return Outcome(code, f"rank {rank} ended with exit code {code}", rank=rank)
    if not by_code:
        return Outcome(3, "ranks ended with no word of why", _AGAIN)
    code = next((code for code in _CAUSES_FIRST if code in by_code), min(by_code))
    return Outcome(code, by_code[code][1], rank=by_code[code][0])
