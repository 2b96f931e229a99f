"""What the launcher adds to a run's events.jsonl, and reads of its folder, while no rank lives.

Every line is one write in append mode, so that launchers of several machines may add to one file.
"""

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_EVENTS, _METRICS = "events.jsonl", "metrics.jsonl"
_TAIL_BYTES = 1 << 16
_APPEND = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC


class Journal:
    """The launcher's view of a run folder; None: a command that has none.

    Nothing here fails for want of a disk: the launcher's work is to keep the run alive.
    """

    def __init__(self, run_dir: Path | None) -> None:
        self._run_dir = run_dir

    def event(self, kind: str, **fields: Any) -> None:
        """Add a line; the ranks' own lines have the same form."""
        if self._run_dir is None or not self._run_dir.is_dir():
            return
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "kind": kind, **fields}).encode() + b"\n"
        try:
            file = os.open(
                self._run_dir / _EVENTS, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
            )
            try:
                _cut_torn_line(file)
                os.write(file, line)
            finally:
                os.close(file)
        except OSError as error:
            self.say(f"{_EVENTS}: {error.strerror}")

    def say(self, text: str) -> None:
        """One line for the user."""
        print(text, file=sys.stderr, flush=True)

    def steps_done(self) -> int:
        """The last step that was recorded; 0 if none was."""
        if self._run_dir is None or not (self._run_dir / _METRICS).is_file():
            return 0
        with (self._run_dir / _METRICS).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
        for line in reversed(lines):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                continue
        return 0

    def checkpoint_step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        # Imported here: torch takes seconds, and a wrong command line should be told at once.
        from moe_runtime.checkpoint.folder import CHECKPOINTS_DIR, list_steps, step_of

        found = [] if self._run_dir is None else list_steps(self._run_dir / CHECKPOINTS_DIR)
        return step_of(found[0].name) or 0 if found else 0


def _cut_torn_line(file: int) -> None:
    """Remove a last line that a power cut or a full disk left without its end."""
    size = os.fstat(file).st_size
    start = max(0, size - _TAIL_BYTES)
    tail = os.pread(file, size - start, start)
    if tail and not tail.endswith(b"\n"):
        os.ftruncate(file, start + tail.rfind(b"\n") + 1)
