"""The pipeline of one step: as it was measured, and as the same program should have gone.

The ideal is the program of the trace, simulated with the costs that the trace itself shows: every action
takes the median time of its kind and stage, and nothing is ever late. What the two differ by is jitter, waits
for a slow rank, and transfers that came late; the schedule's own bubble is in both.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError, ScheduleError
from moe_runtime.planner.figures import Figures, figures_of
from moe_runtime.planner.measured import timeline_of
from moe_runtime.planner.measured_costs import measured_costs
from moe_runtime.planner.simulate import simulate
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.planner.trace import read_trace
from moe_runtime.schedule.action import Action, Kind, actions_of

KINDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRAD: "backward for input",
    Kind.WEIGHT_GRAD: "backward for weights",
}
_PAIR_SPLIT = 0.4  # of a pair's box, the forward's part, as in the drawings of schedules
_MOST_SPANS = 12_000  # of one timeline; more rows than have room for these are left out
_DIGITS = 9  # of seconds: nanoseconds, as in the trace


@dataclass(frozen=True)
class Pipeline:
    """Both timelines of a step.

    Args:
        step: its number.
        schedule: its name.
        measured, ideal: in seconds from the first entry on.
    """

    step: int
    schedule: str
    measured: Timeline
    ideal: Timeline

    @property
    def figures(self) -> tuple[Figures, Figures]:
        """Of the measured step and of the ideal one."""
        return figures_of(self.measured), figures_of(self.ideal)


def read_pipeline(path: Path) -> Pipeline | str | None:
    """The step of a trace; why it cannot be shown; None if there is none."""
    if not path.exists():
        return None
    try:
        trace = read_trace(path)
        measured, costs = timeline_of(trace), measured_costs(trace)
        ideal = replace(simulate(trace.program, costs), unit="s")
    except (ConfigError, ScheduleError) as error:
        return f"{path.name} cannot be shown: {error}"
    ideal = replace(ideal, labels=tuple(f"pp {rank}" for rank in range(len(ideal.rows))))
    return Pipeline(trace.step, trace.program.name, measured, ideal)


def boxes(timeline: Timeline) -> dict[str, Any]:
    """A timeline as columns of boxes, times in milliseconds; `left_out` rows had no room.

    A pair that runs interleaved is two boxes, the forward's first; where it changes colour says nothing.
    `pale` is 0 for the first chunk of a rank and 1 for the last one.
    """
    shown: list[tuple[Span, ...]] = []
    room = _MOST_SPANS
    for row in timeline.rows:
        room -= len(row)
        if room < 0 and shown:
            break
        shown.append(row)
    labels = timeline.labels[: len(shown)] or tuple(f"rank {rank}" for rank in range(len(shown)))
    columns: dict[str, list[Any]] = {
        name: [] for name in ("row", "start", "end", "kind", "pale", "entry", "from", "to", "comm", "exposed")
    }
    for place, row in enumerate(shown):
        chunks = sorted({_chunk(action) for span in row for action in actions_of(span.entry)})
        pale = {chunk: index / max(1, len(chunks) - 1) for index, chunk in enumerate(chunks)}
        for span in row:
            _add_boxes(columns, place, span, pale)
    return {"labels": list(labels), "left_out": len(timeline.rows) - len(shown), **columns}


def _add_boxes(
    columns: dict[str, list[Any]], row: int, span: Span, pale: dict[tuple[int, int], float]
) -> None:
    actions = actions_of(span.entry)
    split = span.start + _PAIR_SPLIT * (span.end - span.start)
    edges = [(span.start, split), (split, span.end)] if len(actions) == 2 else [(span.start, span.end)]
    for action, (start, end) in zip(actions, edges, strict=True):
        values = {
            "row": row,
            "start": _ms(start),
            "end": _ms(end),
            "kind": list(KINDS).index(action.kind),
            "pale": round(pale[_chunk(action)], 2),
            "entry": str(span.entry),
            "from": _ms(span.start),
            "to": _ms(span.end),
            "comm": _ms(span.comm),
            "exposed": _ms(span.exposed),
        }
        for name, value in values.items():
            columns[name].append(value)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, _DIGITS - 3)


def _chunk(action: Action) -> tuple[int, int]:
    return action.direction, action.stage
