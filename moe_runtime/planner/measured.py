"""What a trace says: when each entry ran, and how long it exchanged and stood still for an exchange.

The result is a `Timeline` like a simulated one, with a row for each global rank (the lanes of a pipeline
rank one below the other) and seconds that begin with the first entry. For a span

    comm      the time in which at least one of its exchanges was in flight
    exposed   the time in which the rank stood still for one
    memory    microbatches alive, as the rank counted them; from the order of entries if it did not

so both count a second once, however many exchanges share it.
"""

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from moe_runtime.errors import ConfigError
from moe_runtime.planner.timeline import Span, Timeline
from moe_runtime.planner.trace import COUNTER, Event, Trace
from moe_runtime.schedule.action import Entry, Kind, Program, actions_of, is_transfer

_TRANSFER = re.compile(r"\d+[SR][AG]\d+'*")
_TICK = 1e-6  # seconds by which rounding may let entries overlap
_Interval = tuple[float, float]


def timeline_of(trace: Trace) -> Timeline:
    """The timeline of a measured step.

    Raises:
        ConfigError: an entry of the program is missing, twice there, or unknown; or two ran at once.
    """
    order = trace.by_pipeline_rank()
    events: dict[int, list[Event]] = {rank: [] for rank, _ in order}
    for event in trace.events:
        if not (event.lane == "action" and _TRANSFER.fullmatch(event.name)):
            events[event.rank].append(event)
    begin = min((event.start for event in trace.events if event.lane == "action"), default=0.0)
    rows = [_row(trace.program, trace.pp_ranks[rank], label, events[rank], begin) for rank, label in order]
    return Timeline(
        title=f"{trace.program.name}, step {trace.step}, measured",
        rows=tuple(rows),
        memory=tuple(
            counted_memory(events[rank], trace.program, begin) or live_memory(row, trace.program)
            for (rank, _), row in zip(order, rows, strict=True)
        ),
        unit="s",
        labels=tuple(label for _, label in order),
    )


def counted_memory(events: Iterable[Event], program: Program, begin: float) -> tuple[_Interval, ...]:
    """(time, live memory from then on) of one rank as it was counted; nothing if it was not."""
    unit = program.num_ranks / program.num_stages
    counts = sorted((event.start - begin, int(event.name)) for event in events if event.lane == COUNTER)
    return tuple((time, count * unit) for time, count in counts)


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


def _row(program: Program, pp_rank: int, label: str, events: list[Event], begin: float) -> tuple[Span, ...]:
    """The spans of one global rank."""
    entries = {str(entry): entry for entry in program.rows[pp_rank] if not is_transfer(entry)}
    ran = sorted((event for event in events if event.lane == "action"), key=lambda event: event.start)
    _check_complete(label, entries, Counter(event.name for event in ran))
    _check_apart(label, ran)
    parts = _parts(ran, [event for event in events if event.lane not in ("action", COUNTER)])
    return tuple(_span(entries[event.name], event, own, begin) for event, own in zip(ran, parts, strict=True))


def _check_complete(label: str, entries: Mapping[str, Entry], ran: Counter[str]) -> None:
    wrong = [f"{name}, not in its row" for name in ran if name not in entries]
    wrong += [f"no {name}; did the step end?" for name in entries if name not in ran]
    wrong += [f"{name} twice" for name, count in ran.items() if count > 1]
    if wrong:
        raise ConfigError(f"trace: {label}: expected each entry of the program once, got {wrong[0]}")


def _check_apart(label: str, ran: Sequence[Event]) -> None:
    for before, after in pairwise(ran):
        if after.start < before.end - _TICK:
            got = f"{after.name} begun before {before.name} had ended"
            raise ConfigError(f"trace: {label}: expected one entry after the other, got {got}")


def _parts(ran: Sequence[Event], events: Iterable[Event]) -> list[list[Event]]:
    """For each entry, of those that ran one after the other, the events that share time with it."""
    starts = [event.start for event in ran]
    parts: list[list[Event]] = [[] for _ in ran]
    for event in events:
        for place in range(max(0, bisect_right(starts, event.start) - 1), bisect_left(starts, event.end)):
            parts[place].append(event)
    return parts


def _span(entry: Entry, event: Event, parts: Sequence[Event], begin: float) -> Span:
    start = _computes_from(event, parts)
    waits = [each for each in parts if each.lane == "wait" and each.name == "exchange"]
    exposed = _within(waits, start, event.end)
    flying = _within([each for each in parts if each.lane == "exchange"], start, event.end)
    # A rank can only wait for what is in flight; a wait that a clock puts past its exchange counts as both.
    return Span(entry, start - begin, event.end - begin, _union(flying + exposed), _union(exposed))


def _computes_from(event: Event, parts: Sequence[Event]) -> float:
    """When an entry's own time begins: after it last waited for other pipeline ranks before any phase."""
    first = min((p.start for p in parts if p.lane == "phase" and p.start >= event.start), default=event.end)
    waits = [each for each in parts if each.lane == "wait" and each.name == "transfer"]
    return max(
        [event.start, *(each.end for each in waits if event.start <= each.start and each.end <= first)]
    )


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
