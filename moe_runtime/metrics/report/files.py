"""The files of a run folder, as links beside the report, and its resolved config as text."""

import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from moe_runtime.metrics.files import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, TRACE_FILE
from moe_runtime.metrics.heatmap import HEATMAP_FILE
from moe_runtime.metrics.report.shown import visible

CHECKPOINTS = "checkpoints"
PAGE_FILE = "report.html"
_WHAT = {
    METRICS_FILE: "every number of every step, one JSON object a line",
    EVENTS_FILE: "what happened, one JSON object a line",
    HEATMAP_FILE: "load of every expert over time",
    TRACE_FILE: "one step of all ranks, to be opened in Perfetto or chrome://tracing",
    CONFIG_FILE: "the resolved configuration; moe-runtime train takes it",
}
SERVED = (*_WHAT,)
_LONGEST_CONFIG = 200_000  # characters


@dataclass(frozen=True)
class RunFile:
    """One file of the table of files.

    Args:
        link: relative address from where the page is.
        size: bytes.
    """

    name: str
    link: str
    size: int
    what: str


def files_of(run_dir: Path, page_dir: Path | None) -> list[RunFile]:
    """The files that are there, those for people first.

    Args:
        page_dir: where the page is kept; None: the page is served, and the files are beside it.
    """
    found = []
    for name, what in _WHAT.items():
        path = run_dir / name
        if path.is_file():
            link = name if page_dir is None else _relative(path, page_dir)
            found.append(RunFile(name, link, path.stat().st_size, what))
    return found


def checkpoints_of(run_dir: Path) -> list[str]:
    """Names of the checkpoints on disk, in order."""
    folder = run_dir / CHECKPOINTS
    return sorted(visible(path.name, 80) for path in folder.glob("step_*")) if folder.is_dir() else []


def read_config_text(run_dir: Path) -> str:
    """The resolved config, as it was written; empty if there is none."""
    try:
        return visible((run_dir / CONFIG_FILE).read_text(errors="replace"), _LONGEST_CONFIG)
    except OSError:
        return ""


def _relative(path: Path, page_dir: Path) -> str:
    return quote(os.path.relpath(path.resolve(), page_dir.resolve()))
