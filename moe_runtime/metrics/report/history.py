"""metrics.jsonl as curves: read once, then only what is new, and small however long the run.

Steps ascend in a sound file. Where a line goes back (a roll-back that could not cut the file, files put
together by hand), the later line is the true one, as on resume: the file is then looked through once, and
lines that a later one replaces are left out.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.metrics.panel import PER_LAYER
from moe_runtime.metrics.report.folded import Folded
from moe_runtime.metrics.report.layer_table import LayerTable
from moe_runtime.metrics.report.tail import Tail, parsed

_LARGEST_STEP = 2**53
_DEEPEST = 4  # of nested numbers


class History:
    """What a run has recorded so far.

    Args:
        path: of metrics.jsonl; may be missing.

    Attributes:
        curves: by flat key, as `metrics.panel.flat_values` names them.
        layers: the numbers of each MoE layer.
        torn: lines that are no record.
        replaced: lines that a later one of the same step or an earlier one replaces.
        last: the newest record.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._tail = path, Tail(path)
        self._forget()
        self._left_out: set[int] = set()

    def look(self) -> None:
        """Read what is new."""
        if self._tail.is_changed():
            self._left_out = set()
            self._restart()
        while not self._read():
            self._left_out = _replaced_lines(self._path)
            self._restart()
        self.replaced = len(self._left_out)

    @property
    def last_step(self) -> int:
        """Of the newest record; 0 before the first."""
        return self._last_step

    def value(self, key: str) -> float | None:
        """The newest value of a key; None if there is none."""
        curve = self.curves.get(key)
        return curve.stats.last[1] if curve is not None and curve.stats.last else None

    def _forget(self) -> None:
        self.curves: dict[str, Folded] = {}
        self.layers = LayerTable()
        self.torn = self.replaced = 0
        self.last: dict[str, Any] = {}
        self._line = self._last_step = 0

    def _restart(self) -> None:
        self._tail.restart()
        self._forget()

    def _read(self) -> bool:
        """Read new lines; False if one went back and its forerunners are still there."""
        for line in self._tail.lines():
            self._line += 1
            if self._line in self._left_out:
                continue
            record = parsed(line)
            step = _step_of(record)
            if record is None or step is None:
                self.torn += 1
            elif step <= self._last_step:
                return False
            else:
                self._add(step, record)
        return True

    def _add(self, step: int, record: dict[str, Any]) -> None:
        self._last_step, self.last = step, record
        layers = record.get(PER_LAYER)
        if isinstance(layers, Mapping):
            self.layers.add(step, layers)
        self._take(step, record, "", 1)

    def _take(self, step: int, numbers: Mapping[str, Any], prefix: str, depth: int) -> None:
        """Add numbers to their curves; null, which was measured and is not finite, as NaN."""
        for name, value in numbers.items():
            if type(value) is dict:
                if depth < _DEEPEST and (prefix or name != PER_LAYER):
                    self._take(step, value, f"{prefix}{name}/", depth + 1)
            elif value is None or isinstance(value, int | float):
                key = prefix + name
                curve = self.curves.get(key)
                if curve is None:
                    curve = self.curves[key] = Folded()
                curve.add(step, value if type(value) is float else as_float(value))


def as_float(value: int | float | None) -> float:
    """A number of JSON; its whole numbers may be larger than any float, and null is not finite."""
    try:
        return math.nan if value is None else float(value)
    except OverflowError:
        return math.nan


def _step_of(record: Mapping[str, Any] | None) -> int | None:
    step = record.get("step") if record is not None else None
    return step if type(step) is int and 0 < step < _LARGEST_STEP else None


def _replaced_lines(path: Path) -> set[int]:
    """Numbers of the lines, from 1, that a later line with the same or a smaller step replaces."""
    steps = [_step_of(parsed(line)) for line in Tail(path).lines()]
    least, replaced = _LARGEST_STEP, set()
    for number in range(len(steps), 0, -1):
        step = steps[number - 1]
        if step is not None and step >= least:
            replaced.add(number)
        elif step is not None:
            least = step
    return replaced
