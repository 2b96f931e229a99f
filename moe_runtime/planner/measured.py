"""What a trace says: when each entry ran, and how long it exchanged and stood still for an exchange.

The result is a `Timeline` like a simulated one, with a row for each global rank (the lanes of a pipeline
rank one below the other) and seconds that begin with the first entry. For a span

    comm      the time in which at least one of its exchanges was in flight
    exposed   the time in which the rank stood still for one

so both count a second once, however many exchanges share it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from moe_runtime.errors import ConfigError
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.planner.trace import Event, Trace
from moe_runtime.schedule.action import Entry, Kind, Program, actions_of

_TRANSFER = re.compile(r"\d+[SR][AG]\d+'*")
_Interval = tuple[float, float]


def timeline_of(trace: Trace) -> Timeline:
    """The timeline of a measured step.

    Raises:
        ConfigError: an entry of the program is missing, twice there, or unknown.
    """
    order = trace.by_pipeline_rank()
    lanes: dict[int, dict[str, list[Event]]] = {rank: defaultdict(list) for rank, _ in order}
    for event in trace.events:
        lanes[event.rank][event.lane].append(event)
    begin = min((event.start for rank, _ in order for event in lanes[rank]["action"]), default=0.0)
    rows = [_row(trace.program, trace.pp_ranks[rank], label, lanes[rank], begin) for rank, label in order]
    return Timeline(
        title=f"{trace.program.name}, step {trace.step}, measured",
        rows=tuple(rows),
        memory=tuple(live_memory(row, trace.program) for row in rows),
        unit="s",
        labels=tuple(label for _, label in order),
    )


def live_memory(row: Iterable[Span], program: Program) -> tuple[_Interval, ...]:
    """(time, live memory from then on) of one rank, in units of a stage that is one P-th of the model."""
    live = program.num_ranks / program.num_stages
    changes = []
    for span in row:
        for action in actions_of(span.entry):
            if action.kind is Kind.FORWARD:
                changes.append((span.start, live))
            elif action.kind in (Kind.BACKWARD, Kind.WEIGHT_GRAD):
                changes.append((span.end, -live))
    held, curve = 0.0, []
    for time, change in sorted(changes):  # at one instant what is freed counts before what is taken
        held += change
        curve.append((time, held))
    return tuple(curve)


def _row(
    program: Program, pp_rank: int, label: str, lanes: dict[str, list[Event]], begin: float
) -> tuple[Span, ...]:
    entries = {str(entry): entry for entry in program.rows[pp_rank]}
    left = dict(entries)
    spans = []
    for event in sorted(lanes["action"], key=lambda each: each.start):
        if _TRANSFER.fullmatch(event.name):
            continue
        if event.name not in entries or left.pop(event.name, None) is None:
            got = f"{event.name} twice" if event.name in entries else f"{event.name}, not in its row"
            raise ConfigError(f"trace: {label}: expected each entry of the program once, got {got}")
        spans.append(_span(entries[event.name], event, lanes, begin))
    if left:
        got = f"no {next(iter(left))}; the trace is of a step that did not end"
        raise ConfigError(f"trace: {label}: expected each entry of the program once, got {got}")
    return tuple(spans)


def _span(entry: Entry, event: Event, lanes: dict[str, list[Event]], begin: float) -> Span:
    start = _computes_from(event, lanes)
    waits = _within([each for each in lanes["wait"] if each.name == "exchange"], start, event.end)
    exchanges = _within(lanes["exchange"], start, event.end)
    # A rank can only wait for what is in flight; a wait that a clock puts past its exchange counts as both.
    return Span(entry, start - begin, event.end - begin, _union(exchanges + waits), _union(waits))


def _computes_from(event: Event, lanes: dict[str, list[Event]]) -> float:
    """When an entry's own time begins: after it last waited for other pipeline ranks before any phase."""
    phases = [each.start for each in lanes["phase"] if event.start <= each.start < event.end]
    first = min(phases, default=event.end)
    arrivals = [
        each.end
        for each in lanes["wait"]
        if each.name == "transfer" and event.start <= each.start and each.end <= first
    ]
    return max([event.start, *arrivals])


def _within(events: Iterable[Event], start: float, end: float) -> list[_Interval]:
    """The parts of events that lie in an interval."""
    cut = [(max(each.start, start), min(each.end, end)) for each in events]
    return [interval for interval in cut if interval[0] < interval[1]]


def _union(intervals: Iterable[_Interval]) -> float:
    """The time that at least one of the intervals covers."""
    covered, until = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, until))
        until = max(until, end)
    return covered
