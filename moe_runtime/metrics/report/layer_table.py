"""The numbers of every MoE layer over the steps, folded in time to what fits a picture.

Of the steps that share a bucket each number keeps its worst value: the least of those that are good when they
are large (entropy, margin, the idlest expert), else the greatest. So a layer that was bad for one step of a
long run shows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.metrics.report.folded import Floats, ends_of_groups, wide_enough

EXACT, FEW = 200, 100  # times of a short and of a long run
_WAITING = 256
_WORST_IS_LEAST = ("load_min", "load_entropy", "top_k_margin", "bias_min")


class LayerTable:
    """Grows at its end: a row of numbers a step, a column for each number of each layer."""

    def __init__(self) -> None:
        self.width = 1
        self._columns: dict[tuple[str, str], int] = {}
        self._steps: Floats = np.zeros(0)
        self._rows: Floats = np.zeros((0, 0))
        self._waiting: list[tuple[int, dict[int, float]]] = []

    def add(self, step: int, layers: Mapping[str, Any]) -> None:
        """Add `layers` of a record, of a later step than all before."""
        row = {}
        for layer, values in layers.items():
            if isinstance(values, Mapping):
                for name, value in values.items():
                    column = self._columns.setdefault((layer, name), len(self._columns))
                    row[column] = float(value) if isinstance(value, int | float) else float("nan")
        self._waiting.append((step, row))
        if len(self._waiting) >= _WAITING:
            self._fold()

    @property
    def layers(self) -> list[str]:
        """Prefixes of the layers, in the order of the model."""
        return list(dict.fromkeys(layer for layer, _ in self._columns))

    @property
    def names(self) -> list[str]:
        """What there is of a layer."""
        return list(dict.fromkeys(name for _, name in self._columns))

    def table(self) -> tuple[Floats, NDArray[np.float32]]:
        """First steps of the buckets [times], and numbers [names, layers, times]; NaN where there is none."""
        self._fold()
        layers, names = self.layers, self.names
        found = np.full((len(names), len(layers), len(self._steps)), np.nan, dtype=np.float32)
        for (layer, name), column in self._columns.items():
            found[names.index(name), layers.index(layer)] = self._rows[:, column]
        return self._steps, found

    def _fold(self) -> None:
        if not self._waiting:
            return
        new = np.full((len(self._waiting), len(self._columns)), np.nan)
        for place, (_, row) in enumerate(self._waiting):
            new[place, list(row)] = list(row.values())
        grown = np.full((len(self._rows), len(self._columns)), np.nan)
        grown[:, : self._rows.shape[1]] = self._rows
        self._rows = np.concatenate([grown, new])
        self._steps = np.append(self._steps, [float(step) for step, _ in self._waiting])
        self._waiting.clear()
        self.width = wide_enough(self._steps, self.width, EXACT, FEW)
        if self.width > 1:
            self._merge()

    def _merge(self) -> None:
        firsts, _ = ends_of_groups(self._steps // self.width)
        merged = np.fmax.reduceat(self._rows, firsts, axis=0)
        least = [column for (_, name), column in self._columns.items() if name in _WORST_IS_LEAST]
        merged[:, least] = np.fmin.reduceat(self._rows[:, least], firsts, axis=0)
        self._steps, self._rows = self._steps[firsts], merged
