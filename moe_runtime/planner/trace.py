"""What really happened in one step: events of every rank on one clock, and the file that keeps them.

The file is Chrome's trace form, which Perfetto (ui.perfetto.dev) and chrome://tracing open as it is: a
process for each global rank, sorted by pipeline rank, and in it a track for each lane. Events of one
lane may fly at the same time (exchanges do); a track may not show such, so a lane has as many tracks as
it needs. Whatever else it takes to make sense of the events, the program above all, is under `otherData`.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError, ScheduleError
from moe_runtime.schedule.action import Program, actions_of

LANES = ("action", "phase", "exchange", "transfer", "wait")
COUNTER = "live"
_TITLES = ("actions", "phases", "exchange in flight", "transfers", "stood still")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that a rank did.

    Args:
        rank: global rank.
        lane: "action": an entry of the row, named by its text, from when what it takes in had arrived;
            "phase": a part of it, such as "attend layers.3";
            "exchange": an expert exchange, from its start until its data had arrived;
            "transfer": a send or a receive, from when it was posted until it was done;
            "wait": the rank stood still; the name is "exchange" or "transfer", what it waited for.
            "live": how many microbatches are alive in the rank's stages, from `start` on; the name is
            the number, `end` is `start`.
        start, end: seconds on the clock that all ranks share.
    """

    rank: int
    lane: str
    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Trace:
    """One step of all ranks.

    Args:
        events: in any order.
        program: what ran, without transfers.
        pp_ranks: the pipeline rank of each global rank.
        step: its number.
    """

    events: tuple[Event, ...]
    program: Program
    pp_ranks: tuple[int, ...]
    step: int = 0

    def by_pipeline_rank(self) -> list[tuple[int, str]]:
        """Global ranks and their labels, such as "pp 0 · dp 1", the lanes of a pipeline rank together."""
        order = sorted(range(len(self.pp_ranks)), key=lambda rank: (self.pp_ranks[rank], rank))
        return [(rank, self._label(rank)) for rank in order]

    def _label(self, rank: int) -> str:
        pp_rank = self.pp_ranks[rank]
        if self.pp_ranks.count(pp_rank) == 1:
            return f"pp {pp_rank}"
        return f"pp {pp_rank} · dp {self.pp_ranks[:rank].count(pp_rank)}"


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace as Chrome's JSON.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(json.dumps(to_chrome(trace), allow_nan=False) + "\n")


def to_chrome(trace: Trace) -> dict[str, Any]:
    """The trace as a Chrome trace object, times in microseconds to the nanosecond."""
    program = trace.program
    return {
        "traceEvents": [*_names(trace), *_complete_events(trace), *_counters(trace)],
        "displayTimeUnit": "ms",
        "otherData": {
            "schedule": program.name,
            "step": trace.step,
            "placement": [list(ranks) for ranks in program.placement],
            "num_microbatches": program.num_microbatches,
            "pp_ranks": list(trace.pp_ranks),
            "program": program.to_text(),
        },
    }


def read_trace(path: Path) -> Trace:
    """Read what `write_trace` wrote.

    Raises:
        ConfigError: no such file, or it is not such a trace; one line.
    """
    remedy = "give the trace.json of a run"
    try:
        return _from_chrome(json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {remedy}") from None
    except ScheduleError as error:
        raise ConfigError(f"{path}: otherData.program: {error}; {remedy}") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"{path}: expected a trace that moe-runtime wrote, got {what}; {remedy}") from None


def _names(trace: Trace) -> Iterator[dict[str, Any]]:
    """What the processes and tracks are called, and their order on the screen."""
    for place, (rank, label) in enumerate(trace.by_pipeline_rank()):
        name, order = {"name": f"{label} (rank {rank})"}, {"sort_index": place}
        yield {"ph": "M", "pid": rank, "name": "process_name", "args": name}
        yield {"ph": "M", "pid": rank, "name": "process_sort_index", "args": order}
    tracks = sorted({(event.rank, tid) for event, tid in _tracks(trace.events)})
    for rank, tid in tracks:
        number, lane = divmod(tid, len(LANES))
        name = {"name": _TITLES[lane] + (f" {number + 1}" if number else "")}
        order = {"sort_index": lane * len(tracks) + number}  # all tracks of a lane before the next lane's
        yield {"ph": "M", "pid": rank, "tid": tid, "name": "thread_name", "args": name}
        yield {"ph": "M", "pid": rank, "tid": tid, "name": "thread_sort_index", "args": order}


def _complete_events(trace: Trace) -> Iterator[dict[str, Any]]:
    for event, tid in _tracks(trace.events):
        yield {
            "ph": "X",
            "pid": event.rank,
            "tid": tid,
            "cat": event.lane,
            "name": event.name,
            "ts": round(event.start * 1e6, 3),
            "dur": round((event.end - event.start) * 1e6, 3),
        }


def _counters(trace: Trace) -> Iterator[dict[str, Any]]:
    for event in trace.events:
        if event.lane == COUNTER:
            count = {"microbatches": int(event.name)}
            ts = round(event.start * 1e6, 3)
            yield {"ph": "C", "pid": event.rank, "cat": COUNTER, "name": "alive", "ts": ts, "args": count}


def _tracks(events: tuple[Event, ...]) -> list[tuple[Event, int]]:
    """Every event with its track: of its lane the first that is free; the n-th begins at n x lanes."""
    busy_until: dict[tuple[int, str], list[float]] = {}
    placed = []
    spans = [event for event in events if event.lane in LANES]
    for event in sorted(spans, key=lambda each: (each.rank, LANES.index(each.lane), each.start, each.end)):
        ends = busy_until.setdefault((event.rank, event.lane), [])
        free = next((track for track, end in enumerate(ends) if end <= event.start), len(ends))
        ends[free : free + 1] = [event.end]
        placed.append((event, LANES.index(event.lane) + len(LANES) * free))
    return placed


def _from_chrome(chrome: dict[str, Any]) -> Trace:
    other = chrome["otherData"]
    program = Program.from_text(other["program"])
    _check_sizes(program)
    pp_ranks = tuple(int(rank) for rank in other["pp_ranks"])
    if set(pp_ranks) != set(range(program.num_ranks)):
        raise ValueError(f"pp_ranks {list(pp_ranks)} for a program of {program.num_ranks} rows")
    events = tuple(_event(each, len(pp_ranks)) for each in chrome["traceEvents"] if each["ph"] in "XC")
    return Trace(events, program, pp_ranks, int(other["step"]))


def _check_sizes(program: Program) -> None:
    """Raise ValueError if the program, which `check` may refuse for lacking backwards, names what is not."""
    good = all(0 <= rank < program.num_ranks for ranks in program.placement for rank in ranks)
    good &= len({len(ranks) for ranks in program.placement}) == 1
    actions = [action for row in program.rows for entry in row for action in actions_of(entry)]
    for action in actions:
        good &= action.stage < program.num_stages and action.direction < program.num_directions
    if not (good and actions):
        raise ValueError("a program that does not fit its placement")


def _event(fields: dict[str, Any], num_ranks: int) -> Event:
    is_counter = fields["ph"] == "C"
    start, duration = float(fields["ts"]) / 1e6, float(fields.get("dur", 0.0)) / 1e6
    name = str(int(fields["args"]["microbatches"])) if is_counter else str(fields["name"])
    event = Event(int(fields["pid"]), str(fields["cat"]), name, start, start + duration)
    good = math.isfinite(event.end) and duration >= 0 and 0 <= event.rank < num_ranks
    good &= event.lane in ((COUNTER,) if is_counter else LANES)
    if not good:
        raise ValueError(f"event {fields}")
    return event
