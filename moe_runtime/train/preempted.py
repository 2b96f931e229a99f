"""A file in the run folder that says: a scheduler took the machine away, all is saved, start me again.

The exit code cannot say it: it is 0, as after any stop that lost nothing.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

MARKER = "preempted.json"


def leave_marker(run_dir: Path, step: int) -> None:
    """Say that the run was told to leave (SIGTERM) and stands saved after `step` steps."""
    time = datetime.now(UTC).isoformat(timespec="seconds")
    new = run_dir / f".{MARKER}.new"
    new.write_text(json.dumps({"step": step, "time": time, "signal": "SIGTERM"}) + "\n")
    os.replace(new, run_dir / MARKER)


def take_marker(run_dir: Path) -> str | None:
    """What to tell of a marker, which is removed; None if there is none."""
    path = run_dir / MARKER
    try:
        found = json.loads(path.read_text())
        path.unlink()
    except (OSError, ValueError):
        return None
    return f"the run was preempted at {found.get('time')} after step {found.get('step')} and goes on"
