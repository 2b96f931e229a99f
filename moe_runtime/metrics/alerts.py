"""Alerts: a fold over the records of a run, and nothing else.

    memory, record -> memory, what is raised, what is over

No clock, no file, no random number: the same records raise the same alerts, in a run that was never stopped,
in one that resumed (the memory lies in its checkpoints), and when an old metrics.jsonl is judged again with
other thresholds. A number that a step did not measure leaves its rule as it was, so patience counts
measurements. A number that is not finite is beyond every threshold.

Once raised, an alert stays so until the number was back for as many measurements: what flutters about a
threshold is told once. Judging a step by the records before it, as a z-score does, was left to the metrics:
a rule that learns what is normal also learns what is wrong.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

KEPT = 20  # values of the metric that an alert shows
_SLOWEST, _SLOWEST_RANK = "straggler_ratio", "straggler_rank"  # whose place is another number
_SHOWN = 3  # places in its message; the event has all


@dataclass(frozen=True)
class Rule:
    """What one alert watches.

    Args:
        name: as it is told.
        metric: path in the record; `*` stands for any name, and the worst of them counts.
        limit: the number must not lie beyond it.
        is_floor: beyond means below; else above.
        patience: measurements in a row beyond the limit that raise the alert, and within it that end it.
        actions: what the run does.
        advice: what may be behind it, and what to do; empty for a user's own.
    """

    name: str
    metric: str
    limit: float
    is_floor: bool = False
    patience: int = 1
    actions: tuple[str, ...] = ("log",)
    advice: str = ""

    def is_beyond(self, value: float) -> bool:
        """True of NaN too."""
        return not (value >= self.limit if self.is_floor else value <= self.limit)


@dataclass
class Memory:
    """What one rule remembers from record to record.

    Args:
        beyond, within: measurements in a row on either side, at most one of them above 0.
        is_raised: it was told, and is not over.
        last: newest values, as (step, value).
    """

    beyond: int = 0
    within: int = 0
    is_raised: bool = False
    last: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=KEPT))


@dataclass(frozen=True)
class Alert:
    """An alert as it is raised.

    Args:
        where: what of the metric is beyond the limit: layers, operand classes; worst first.
        last: the newest values of the metric, (step, value), the one that raised it at the end.
    """

    rule: Rule
    step: int
    value: float
    where: tuple[str, ...]
    last: tuple[tuple[int, float], ...]

    @property
    def message(self) -> str:
        """One line: which number, what was expected, what it is, where, for how long, and what to do."""
        rule = self.rule
        sense = "at least" if rule.is_floor else "at most"
        more = ", ..." if len(self.where) > _SHOWN else ""
        places = f" ({', '.join(self.where[:_SHOWN])}{more})" if self.where else ""
        row = f", {rule.patience} times in a row" if rule.patience > 1 else ""
        advice = f"; {rule.advice}" if rule.advice else ""
        return (
            f"alert {rule.name}: {rule.metric}{places}: expected {sense} {rule.limit:g}, "
            f"got {self.value:.4g}{row}{advice}"
        )

    def fields(self) -> dict[str, Any]:
        """The event, as events.jsonl holds it; numbers that are not finite are null."""
        return {
            "alert": self.rule.name,
            "metric": self.rule.metric,
            "value": _finite(self.value),
            "threshold": self.rule.limit,
            "patience": self.rule.patience,
            "action": list(self.rule.actions),
            "where": list(self.where),
            "last": [[step, _finite(value)] for step, value in self.last],
        }


class Alerts:
    """The rules of a run with what they remember.

    Args:
        rules: names are unique.
    """

    def __init__(self, rules: tuple[Rule, ...]) -> None:
        self.rules = rules
        self._memory = {rule.name: Memory() for rule in rules}

    def update(self, record: Mapping[str, Any]) -> tuple[list[Alert], list[Rule]]:
        """Take a step into account; gives the alerts that it raises, and the rules whose alert is over."""
        raised, over = [], []
        for rule in self.rules:
            memory = self._memory[rule.name]
            found = _worst(rule, record)
            if found is None:
                continue
            memory.last.append((record["step"], found[1]))
            if _turn(rule, memory, found[1]):
                if memory.is_raised:
                    raised.append(_alert(rule, record, found, memory))
                else:
                    over.append(rule)
        return raised, over

    def to_json(self) -> dict[str, Any]:
        """What a checkpoint keeps: of rules that have something to remember."""
        return {
            name: {
                "beyond": memory.beyond,
                "within": memory.within,
                "is_raised": memory.is_raised,
                "last": [[step, _finite(value)] for step, value in memory.last],
            }
            for name, memory in self._memory.items()
            if memory.last
        }

    def restore(self, fields: Mapping[str, Any]) -> None:
        """Take what `to_json` gave; rules that it does not know begin anew."""
        for rule in self.rules:
            kept = fields.get(rule.name)
            self._memory[rule.name] = Memory() if kept is None else _memory_of(kept)


def measured(record: Mapping[str, Any], metric: str) -> Iterator[tuple[str, float]]:
    """The numbers of a record that a path stands for, by the names in place of its `*`, joined by `/`."""
    for names, value in _walk(record, metric.split("/"), ()):
        if value is not None and not isinstance(value, str | Mapping):
            yield "/".join(names), float(value)


def _walk(value: Any, parts: list[str], names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not parts:
        yield names, value
    elif isinstance(value, Mapping):
        if parts[0] != "*":
            yield from _walk(value.get(parts[0]), parts[1:], names)
            return
        for name, inner in value.items():
            yield from _walk(inner, parts[1:], (*names, name))


def _worst(rule: Rule, record: Mapping[str, Any]) -> tuple[str, float] | None:
    """The value that the rule judges, and where it is from; None if the step did not measure it."""
    return next(iter(_sorted(rule, record, rule.metric)), None)


def _sorted(rule: Rule, record: Mapping[str, Any], metric: str) -> list[tuple[str, float]]:
    """Worst first; NaN is worse than any number."""
    sign = 1.0 if rule.is_floor else -1.0
    found = list(measured(record, metric))
    return sorted(found, key=lambda pair: -math.inf if math.isnan(pair[1]) else sign * pair[1])


def _turn(rule: Rule, memory: Memory, value: float) -> bool:
    """Count a measurement; True if the alert is raised or over by it."""
    if rule.is_beyond(value):
        memory.beyond, memory.within = memory.beyond + 1, 0
        turns = not memory.is_raised and memory.beyond >= rule.patience
    else:
        memory.beyond, memory.within = 0, memory.within + 1
        turns = memory.is_raised and memory.within >= rule.patience
    memory.is_raised ^= turns
    return turns


def _alert(rule: Rule, record: Mapping[str, Any], found: tuple[str, float], memory: Memory) -> Alert:
    places = [name for name, value in _sorted(rule, record, _spread_of(rule.metric)) if rule.is_beyond(value)]
    if rule.metric == _SLOWEST and record.get(_SLOWEST_RANK) is not None:
        places = [f"rank {record[_SLOWEST_RANK]}"]
    return Alert(rule, record["step"], found[1], tuple(filter(None, places)), tuple(memory.last))


def _spread_of(metric: str) -> str:
    """The path that names the places of a metric: `routing/violation/max` is of `layers/*/violation`."""
    parts = metric.split("/")
    return f"layers/*/{parts[1]}" if parts[0] == "routing" and len(parts) == 3 else metric


def _memory_of(kept: Mapping[str, Any]) -> Memory:
    memory = Memory(kept["beyond"], kept["within"], kept["is_raised"])
    memory.last.extend((step, math.nan if value is None else value) for step, value in kept["last"])
    return memory


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
