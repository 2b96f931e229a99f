"""What a run went through: time that counts, restarts, steps done twice, checkpoints. Kept by rank 0.

    launched   | attempt 1: steps ....... fault | attempt 2: steps ....... stopped |      launched again
    run_s      |------------------------------------------------------------------>|      |------------>
    train_s                 ==== ==== ====                   ==== ==== ====                     ==== ====

Nearly everything follows from events.jsonl, to which launchers and ranks add and which outlives them all, so
the ledger is a function of the events, past and present, and needs no file of its own. Two sums go from
record to record: the seconds of the steps that count, and those for which a launcher was at work on the run.
The time from the end of one launcher to the start of the next is nobody's failure to train: it is left out.

A run begins anew where a launcher's first attempt starts at step 0: what was before is of another run.
"""

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any


class Ledger:
    """Sums up events and steps.

    Args:
        past: lines of events.jsonl, in order, without that of the attempt that begins now.
        last: the last record that any attempt has written, also one that is done again; None: there is none.
        kept: the last record that counts; likewise.
        start: steps done where this attempt begins.
        attempt: its number, from 1.
        lived_s: since this process was started, to load libraries and build the model.
    """

    def __init__(
        self,
        past: Iterable[Mapping[str, Any]],
        last: Mapping[str, Any] | None,
        kept: Mapping[str, Any] | None,
        start: int,
        attempt: int,
        lived_s: float = 0.0,
    ) -> None:
        self._forget()
        self._begun: tuple[float, float] | None = None  # (wall clock, run_s) when the last attempt began
        for event in past:
            self.add(event)
        is_new = start == 0 and attempt == 1
        if is_new:
            self._forget()
        self.lost_steps_now = 0 if is_new or last is None else max(0, last.get("step", 0) - start)
        self.run_s = lived_s if is_new else self._run_s_at_start(last or {}, attempt, lived_s)
        self._train_s = (kept or {}).get("train_s", 0.0)
        self._since = time.monotonic()

    def _forget(self) -> None:
        self._restarts = self._lost_steps = self._mismatches = 0
        self._repairs: list[float] = []
        self._fault_at: float | None = None
        self._checkpoint: dict[str, Any] = {}

    def _run_s_at_start(self, last: Mapping[str, Any], attempt: int, lived_s: float) -> float:
        if attempt > 1 and self._begun is not None:
            wall, run_s = self._begun
            return run_s + max(0.0, time.time() - wall)
        return float(last.get("run_s", 0.0)) + lived_s

    def add(self, event: Mapping[str, Any]) -> None:
        """Take an event; those of no interest, and lines that nobody here has written, change nothing."""
        with suppress(KeyError, TypeError, ValueError):
            self._take(event)

    def _take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("kind")
        if kind == "attempt":
            self._begins(event)
        elif kind == "fault":
            self._fault_at = _seconds(event)
        elif kind == "recovered":
            self._repairs.append(float(event["seconds"]))
        elif kind == "roll_back":
            self._lost_steps += event["step"] - event["to_step"]
        elif kind == "corruption":
            self._mismatches += 1
        elif kind == "checkpoint":
            self._checkpoint = {
                "step": event["step"],
                "blocked_s": event["blocked_s"],
                "save_s": event["blocked_s"] + event["write_s"],
            }

    def _begins(self, event: Mapping[str, Any]) -> None:
        step, number = event["step"], event.get("attempt", 1)
        if step == 0 and number == 1:
            self._forget()
        if number > 1 and self._fault_at is not None:
            self._restarts += 1
        elif number == 1:
            self._fault_at = None  # a new launcher: how long nobody started it is not the machine's affair
        self._lost_steps += event.get("lost_steps", 0)
        self._begun = _seconds(event), event.get("run_s", 0.0)
        if step:
            self._checkpoint["step"] = step
        else:
            self._checkpoint = {}

    def repaired_after(self) -> float | None:
        """Seconds from the last fault until now, once, when a step is done; None where there was none."""
        fault_at, self._fault_at = self._fault_at, None
        return None if fault_at is None else max(0.0, time.time() - fault_at)

    def roll_back(self, kept: Mapping[str, Any] | None) -> None:
        """Steps were taken back; `kept` is the last record that counts."""
        self._train_s = (kept or {}).get("train_s", 0.0)

    def step(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """What a record has of reliability, this step counted."""
        now = time.monotonic()
        self.run_s, self._since = self.run_s + now - self._since, now
        if not record.get("skipped"):
            self._train_s += record.get("step_s") or 0.0
        saved = self._checkpoint.get("step")
        return {
            "run_s": self.run_s,
            "train_s": self._train_s,
            "ettr": min(1.0, self._train_s / self.run_s) if self.run_s > 0 else None,
            "restarts": self._restarts,
            "lost_steps": self._lost_steps,
            "mttr_s": sum(self._repairs) / len(self._repairs) if self._repairs else None,
            "checkpoint_age": None if saved is None else record["step"] - saved,
            "verified_step": saved,
            "checkpoint_s": self._checkpoint.get("save_s"),
            "checkpoint_blocked_s": self._checkpoint.get("blocked_s"),
            "digest_mismatches": self._mismatches,
        }


def _seconds(event: Mapping[str, Any]) -> float:
    """When an event was, on the wall clock."""
    return datetime.fromisoformat(event["time"]).timestamp()
