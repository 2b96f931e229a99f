"""What a run that was made says of itself: its config, its records, its trace.

From the trace of one step, for each phase the seconds that a rank computed in it (what it stood still for
taken off), and for each exchange the time from the moment when the last rank had come to it until its rows
were there.
"""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.trace import Event, Trace, read_trace

CONFIG, RECORDS, TRACE = "config.yaml", "metrics.jsonl", "trace.json"


@dataclass(frozen=True)
class Observed:
    """A run folder, read.

    Args:
        records: of every step, in order.
        trace: of one step; None if the run kept none.
    """

    folder: Path
    config: RunConfig
    records: tuple[Mapping[str, Any], ...]
    trace: Trace | None

    @property
    def steady(self) -> tuple[Mapping[str, Any], ...]:
        """Records without those of the first step, which sets things up, and of the traced one."""
        traced = None if self.trace is None else self.trace.step
        kept = [record for record in self.records[1:] if record["step"] != traced]
        return tuple(kept) or self.records

    def median(self, key: str) -> float | None:
        """Over steady steps; None if it was not recorded."""
        values = [record[key] for record in self.steady if record.get(key) is not None]
        return statistics.median(values) if values else None

    @property
    def step_s(self) -> float:
        """Median seconds of a step."""
        found = self.median("step_s")
        assert found is not None, "a record without step_s"
        return found


def observe(folder: Path) -> Observed:
    """Read a run folder.

    Raises:
        ConfigError: it is none, or has no record of a step.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise ConfigError(f"{folder}: expected a run folder with {CONFIG}, got none; give RUNS/NAME of a run")
    lines = (folder / RECORDS).read_text().splitlines() if (folder / RECORDS).is_file() else []
    try:
        records = tuple(record for record in map(json.loads, lines) if "step_s" in record)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{folder / RECORDS}: expected one JSON object a line, got {error}") from None
    if not records:
        raise ConfigError(f"{folder / RECORDS}: expected records of steps, got none; let the run make a step")
    trace = read_trace(folder / TRACE) if (folder / TRACE).is_file() else None
    return Observed(folder, load_config(config), records, trace)


def phase_samples(trace: Trace) -> dict[str, list[tuple[int, str, float]]]:
    """By phase, such as `attend_b`: (rank, layer, seconds computed) of every time that it ran, in order."""
    waits: dict[int, list[Event]] = defaultdict(list)
    for event in trace.events:
        if event.lane == "wait":
            waits[event.rank].append(event)
    samples: dict[str, list[tuple[int, str, float]]] = defaultdict(list)
    for event in sorted(trace.events, key=lambda each: each.start):
        if event.lane == "phase":
            name, _, layer = event.name.partition(" ")
            stood = _stood_still(event, waits[event.rank])
            samples[name].append((event.rank, layer, event.end - event.start - stood))
    return samples


def _stood_still(event: Event, waits: Sequence[Event]) -> float:
    inside = (each for each in waits if each.start >= event.start - 1e-7 and each.end <= event.end + 1e-7)
    return sum(each.end - each.start for each in inside)


def exchange_seconds(trace: Trace, ep: int) -> list[float]:
    """Of every exchange, from the last of its ranks' coming until it was there: the least of their times."""
    by_group: dict[tuple[int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for event in sorted(trace.events, key=lambda each: each.start):
        if event.lane == "exchange":
            by_group[event.rank // ep, event.name][event.rank].append(event.end - event.start)
    return [
        min(together)
        for ranks in by_group.values()
        for together in zip(*ranks.values(), strict=False)
        if len(ranks) == ep
    ]


def program_seconds(trace: Trace) -> float:
    """From the first entry's start to the last one's end, of any rank."""
    actions = [event for event in trace.events if event.lane == "action"]
    return max(event.end for event in actions) - min(event.start for event in actions)


def routing_variation(trace: Trace, ep: int, local_experts: int) -> float:
    """Standard deviation of one expert's rows in a microbatch over their mean, from how long experts took.

    A rank's experts take as long as it has rows; what their time varies over the ranks of a group is the
    square root of experts a rank, times (ep - 1) / ep, less than that of one expert.
    """
    if ep == 1:
        return 0.0
    ranks: dict[tuple[int, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rank, layer, seconds in phase_samples(trace).get("experts", []):
        ranks[rank // ep, layer][rank].append(seconds)
    squares = []
    for group in ranks.values():
        for together in zip(*group.values(), strict=False):
            mean = statistics.mean(together)
            squares += [(seconds / mean - 1) ** 2 for seconds in together]
    deviation = statistics.mean(squares) ** 0.5 if squares else 0.0
    return float(deviation / ((ep - 1) / ep / local_experts) ** 0.5)
