"""The words and tables of the report as HTML, each part under the id of its place on the page.

The templates escape whatever they are given; nothing of a run reaches the page unescaped.
"""

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from moe_runtime.metrics.panel import RELIABILITY, SECTIONS
from moe_runtime.metrics.record import metric_of
from moe_runtime.metrics.report.curves_of_panels import (
    in_words,
    labels_of,
    line_panels,
    numbers_of,
    panel_id,
    unseen,
)
from moe_runtime.metrics.report.files import checkpoints_of, files_of, read_config_text
from moe_runtime.metrics.report.image_figures import KIND_COLOURS
from moe_runtime.metrics.report.journal import shown_events, shown_samples
from moe_runtime.metrics.report.line_figure import look_of
from moe_runtime.metrics.report.pipeline import KINDS, Pipeline
from moe_runtime.metrics.report.run_state import run_state
from moe_runtime.metrics.report.run_view import RunView
from moe_runtime.metrics.report.shown import unhidden, visible
from moe_runtime.metrics.report.summary import facts_of

_TEMPLATES = "page"
_PARTS = "parts.html"


@cache
def templates() -> Environment:
    """The page's templates; they escape, and refuse a name that they were not given."""
    return Environment(
        loader=PackageLoader("moe_runtime.metrics.report", _TEMPLATES),
        autoescape=True,
        finalize=_safe,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _safe(value: Any) -> Any:
    """What a template is about to write: text of a run without hidden characters, our own HTML as it is."""
    return unhidden(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def texts_of(view: RunView, page_dir: Path | None) -> dict[str, str]:
    """HTML of every part that changes as a run goes on, by id.

    Args:
        page_dir: where the page is kept, for links to files; None if it is served.
    """
    events, more_events = shown_events(view.journal.lines)
    samples, more_samples = shown_samples(view.journal.lines)
    dead, more_dead = view.dead
    steps = view.heatmap.steps
    counted = (len(dead) + more_dead, steps[-1]) if steps else None
    state = run_state(view.run_dir, view.journal.lines, view.history.last_step)
    parts = {
        "state": _part("state", state=state, problems=_problems(view)),
        "summary": _part("summary", groups=facts_of(view.config, view.history, view.journal.lines, counted)),
        "dead-experts": _part("dead_experts", heatmap=view.heatmap, dead=dead, more=more_dead),
        "pipeline-figures": _pipeline(view.pipeline),
        "samples": _part("samples", samples=samples, more=more_samples),
        "events": _part("events", events=events, more=more_events),
        "config": _part("config", text=read_config_text(view.run_dir)),
        "files": _part(
            "files", files=files_of(view.run_dir, page_dir), checkpoints=checkpoints_of(view.run_dir)
        ),
    }
    return parts | _panels(view) | _not_measured(view)


def _panels(view: RunView) -> dict[str, str]:
    curves, shown = view.history.curves, view.keys_by_panel()
    parts = {}
    for panel in line_panels():
        name = panel_id(panel)
        keys = shown.get(name)
        if keys:
            rows = [(row, metric_of(row.key)) for row in numbers_of(keys, curves)]
            legend = [*zip(keys, labels_of(keys), look_of(keys), strict=True)]
            parts[f"words-{name}"] = _part("words", text=in_words(panel, keys, curves))
            parts[f"legend-{name}"] = _part("legend", legend=legend)
            parts[f"numbers-{name}"] = _part("numbers", rows=rows, name=name)
    return parts


def _not_measured(view: RunView) -> dict[str, str]:
    """What a section could show and this run did not measure; what was measured and no picture shows."""
    shown, parts = view.keys_by_panel(), {}
    for section in SECTIONS:
        absent = [
            panel.title
            for panel in line_panels()
            if panel.section == section and panel_id(panel) not in shown
        ]
        told = section == RELIABILITY and bool(view.journal.of("checkpoint"))
        parts[f"absent-{section.lower()}"] = _part("absent", titles=absent, told=told)
    parts["unseen"] = _part("unseen", rows=numbers_of(unseen(view.history.curves), view.history.curves))
    return parts


def _pipeline(pipeline: Pipeline | str | None) -> str:
    if not isinstance(pipeline, Pipeline):
        return _part("no_pipeline", reason=visible(pipeline or ""))
    measured, ideal = pipeline.figures
    names = ("makespan", "bubble_fraction", "exposed_comm_fraction")
    rows = [(name, getattr(measured, name), getattr(ideal, name)) for name in names]
    # The costs of the ideal have only the exchange that was not hidden, so it can say nothing of the rest.
    rows.append(("hidden_comm_fraction", measured.hidden_comm_fraction, None))
    timeline = pipeline.measured
    ranks = [
        (
            label,
            timeline.busy(rank),
            timeline.bubble(rank),
            timeline.exposed(rank),
            timeline.peak_memory(rank),
        )
        for rank, label in enumerate(timeline.labels)
    ]
    kinds = [*zip(KINDS.values(), KIND_COLOURS, strict=True)]
    return _part("pipeline", pipeline=pipeline, rows=rows, ranks=ranks, kinds=kinds)


def _problems(view: RunView) -> list[str]:
    """What of the run folder could not be read, in sentences."""
    history, found = view.history, []
    if history.torn:
        found.append(f"{history.torn:,} lines of metrics.jsonl are no records and were left out")
    if history.replaced:
        found.append(
            f"{history.replaced:,} lines of metrics.jsonl are replaced by later lines of the same steps"
        )
    if view.journal.torn:
        found.append(f"{view.journal.torn:,} lines of events.jsonl are no events and were left out")
    if view.config is None and read_config_text(view.run_dir):
        found.append("config.yaml is not one that this version knows: facts that follow from it are missing")
    return found


def _part(part: str, /, **values: Any) -> str:
    return templates().get_template(_PARTS).render(part=part, **values)
