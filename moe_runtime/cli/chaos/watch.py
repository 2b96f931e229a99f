"""Follows a run from outside, by its folder alone: steps done, and when what happened.

The records carry no time of day for steps, so they are looked at often and stamped here; a stamp is late by
one look at most.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.metrics.files import EVENTS_FILE, METRICS_FILE
from moe_runtime.metrics.jsonl import read_jsonl

LOOK_S = 0.05  # seconds between looks


@dataclass
class Watch:
    """What has been seen of a run so far.

    Args:
        run_dir: its folder; may not exist yet.
        step: newest step done.
        stamps: step -> seconds of `time.time()` when it was first seen in the present attempt.
    """

    run_dir: Path
    step: int = 0
    stamps: dict[int, float] = field(default_factory=dict)
    _offset: int = 0

    def look(self) -> int:
        """Read what is new; gives the newest step. A shorter file is a resumed run, read from its start."""
        path = self.run_dir / METRICS_FILE
        size = path.stat().st_size if path.exists() else 0
        if size < self._offset:
            self._offset, self.stamps = 0, {}
        if size > self._offset:
            with path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._offset += len(whole)
            now = time.time()
            for line in whole.splitlines():
                self.step = int(json.loads(line)["step"])
                self.stamps.setdefault(self.step, now)
        return self.step

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Events of the run, of one kind or all."""
        found = read_jsonl(self.run_dir / EVENTS_FILE)
        return [event for event in found if kind is None or event["kind"] == kind]


def productive_s(run_dir: Path) -> float:
    """Seconds of the steps that count: each step once, as the final record has it."""
    return sum(float(line["step_s"]) for line in read_jsonl(run_dir / METRICS_FILE))
