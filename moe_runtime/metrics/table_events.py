"""The events of a run that become rows of tables: generated samples, and alerts."""

from pathlib import Path
from typing import Any

from moe_runtime.metrics.jsonl import read_jsonl

SAMPLE, ALERT = "sample", "alert"


def read_table_events(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The samples and alerts of a run, by step; of what was made twice (after a restart) the newer one.

    Args:
        path: of events.jsonl.
        last_step: those of later steps are left out, for they will be made again; None: all.
    """
    newest: dict[tuple[int, str, str, str], dict[str, Any]] = {}
    for event in read_jsonl(path):
        kind, step = event.get("kind"), event.get("step")
        if kind in (SAMPLE, ALERT) and isinstance(step, int) and (last_step is None or step <= last_step):
            newest[step, kind, str(event.get("alert")), str(event.get("metric"))] = event
    return [newest[key] for key in sorted(newest)]
