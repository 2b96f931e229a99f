"""events.jsonl as the report shows it: what happened, what the model wrote, what to mark in curves."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_runtime.metrics.report.shown import as_text, visible
from moe_runtime.metrics.report.tail import Tail, parsed

Level = Literal["bad", "change", "routine"]
SAMPLE, ALERT = "sample", "alert"
_BAD = {
    ALERT,
    "fault",
    "spike",
    "skipped",
    "corruption",
    "checkpoint_failed",
    "straggler",
    "warning",
    "no_roll_back",
    "optim_numerics",
}
_ROUTINE = {"checkpoint", "checkpoint_waited", "trace", SAMPLE}
_MOST_EVENTS: dict[Level, int] = {"bad": 300, "change": 200, "routine": 60}
_MOST_SAMPLES = 40
_MOST_MARKS = 200
_OWN = {"time", "kind", "step", "message", "attempt", "last"}


@dataclass(frozen=True)
class Event:
    """One line of the table of events.

    Args:
        time: as it was written.
        step: None where it belongs to none.
        details: what else the line held, as text.
        last: newest values of the metric of an alert, (step, value).
    """

    time: str
    kind: str
    level: Level
    step: int | None
    attempt: int | None
    message: str
    details: str
    last: tuple[tuple[float, float], ...]


class Journal:
    """The events of a run so far; a missing file has none."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self.lines: list[dict[str, Any]] = []
        self.torn = 0

    def look(self) -> None:
        """Read what is new."""
        if self._tail.is_changed():
            self._tail.restart()
            self.lines, self.torn = [], 0
        for line in self._tail.lines():
            fields = parsed(line)
            if fields is None or not isinstance(fields.get("kind"), str):
                self.torn += 1
            else:
                self.lines.append(fields)

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        """The events of some kinds, in order."""
        return [line for line in self.lines if line["kind"] in kinds]


def shown_events(lines: Sequence[dict[str, Any]]) -> tuple[list[Event], int]:
    """The events of the table, newest first, and how many are left out: the oldest of each level."""
    room = dict(_MOST_EVENTS)
    shown, left_out = [], 0
    for line in reversed(lines):
        level = level_of(line["kind"])
        if line["kind"] == SAMPLE:
            continue
        if room[level] == 0:
            left_out += 1
            continue
        room[level] -= 1
        shown.append(_event(line, level))
    return shown, left_out


def shown_samples(lines: Iterable[dict[str, Any]]) -> tuple[list[tuple[int | None, str]], int]:
    """Steps and texts, newest first, and how many are left out: evenly, never the first nor the last."""
    samples = [line for line in lines if line["kind"] == SAMPLE]
    count = min(len(samples), _MOST_SAMPLES)
    places = {round(place * (len(samples) - 1) / max(1, count - 1)) for place in range(count)}
    kept = [samples[place] for place in sorted(places, reverse=True)]
    shown = [(_whole(line.get("step")), as_text(line.get("text", ""))) for line in kept]
    return shown, len(samples) - len(shown)


def marks(lines: Iterable[dict[str, Any]]) -> list[tuple[int, str, Level]]:
    """Steps to mark in the curves, and why: what was bad, and where the run began again."""
    found = []
    for line in lines:
        step, level = _whole(line.get("step")), level_of(line["kind"])
        begun_again = line["kind"] == "attempt" and (line.get("attempt") or 1) != 1
        if step is not None and (level == "bad" or begun_again or line["kind"] == "roll_back"):
            name = line.get("alert") if line["kind"] == ALERT else line["kind"]
            found.append((step, visible(str(name), 60), level))
    return found[-_MOST_MARKS:]


def level_of(kind: str) -> Level:
    """How much a kind of event matters."""
    return "bad" if kind in _BAD else "routine" if kind in _ROUTINE else "change"


def _event(line: dict[str, Any], level: Level) -> Event:
    rest = {key: value for key, value in line.items() if key not in _OWN}
    return Event(
        time=as_text(line.get("time", "")),
        kind=visible(line["kind"], 60),
        level=level,
        step=_whole(line.get("step")),
        attempt=_whole(line.get("attempt")),
        message=next((as_text(line[key]) for key in ("message", "cause") if key in line), None)
        or _told(rest),
        details=visible(json.dumps(rest, indent=1, ensure_ascii=False)) if rest else "",
        last=_points(line.get("last")),
    )


def _told(rest: dict[str, Any]) -> str:
    """The fields in one line, for an event that has no message of its own."""
    parts = [
        f"{key} {value:.6g}" if isinstance(value, float) else f"{key} {value}" for key, value in rest.items()
    ]
    return visible(", ".join(parts), 300)


def _points(last: Any) -> tuple[tuple[float, float], ...]:
    points = last if isinstance(last, list) else []
    pairs = (tuple(point) for point in points if isinstance(point, list) and len(point) == 2)
    return tuple((float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e300


def _whole(value: Any) -> int | None:
    return value if type(value) is int else None
