"""A curve of any length in few points: those that a picture of it cannot do without.

Steps are put into buckets whose width is a power of two. Of each bucket the least and the greatest value
stay, each at its own step, and the first value that is not finite: a spike of one step among a hundred
thousand is still there, at its step and to the digit. Means were rejected: they draw a number that nobody
measured, and hide the spike.

A folded curve is again a curve, and folding it with what came later gives the same as folding all at once, so
a live page reads each line of a run once. Up to `EXACT` points nothing is left out.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EXACT = 1024  # points up to which a curve is kept whole
FEW = 512  # buckets of a longer one at most
_WAITING = 4096  # points that wait to be folded together
Floats = NDArray[np.float64]


@dataclass
class Stats:
    """What is known of all points of a curve, folded or not; a place is (step, value).

    Args:
        count: points; `num_bad` of them are not finite, the first one at `first_bad`.
    """

    count: int = 0
    first: tuple[int, float] | None = None
    last: tuple[int, float] | None = None
    least: tuple[int, float] | None = None
    greatest: tuple[int, float] | None = None
    num_bad: int = 0
    first_bad: int | None = None

    def add(self, steps: Floats, values: Floats) -> None:
        """More points, at later steps than all before."""
        places = [
            (int(step), float(value)) for step, value in ((steps[0], values[0]), (steps[-1], values[-1]))
        ]
        self.count += len(steps)
        self.first, self.last = self.first or places[0], places[1]
        bad = np.flatnonzero(~np.isfinite(values))
        self.num_bad += len(bad)
        if len(bad) and self.first_bad is None:
            self.first_bad = int(steps[bad[0]])
        if len(bad) == len(values):
            return
        low, high = int(np.nanargmin(values)), int(np.nanargmax(values))
        if self.least is None or values[low] < self.least[1]:
            self.least = (int(steps[low]), float(values[low]))
        if self.greatest is None or values[high] > self.greatest[1]:
            self.greatest = (int(steps[high]), float(values[high]))


class Folded:
    """A curve that grows at its end and stays small."""

    def __init__(self) -> None:
        self.width = 1
        self._stats = Stats()
        self._steps: Floats = np.zeros(0)
        self._values: Floats = np.zeros(0)
        self._new_steps: list[int] = []
        self._new_values: list[float] = []

    @property
    def stats(self) -> Stats:
        """Of all points so far."""
        self._fold()
        return self._stats

    def add(self, step: int, value: float) -> None:
        """Add a point, at a later step than all before; NaN where it is not finite."""
        self._new_steps.append(step)
        self._new_values.append(value)
        if len(self._new_steps) >= _WAITING:
            self._fold()

    def points(self) -> tuple[Floats, Floats]:
        """Steps and values, ascending; the last point is always there."""
        last = self.stats.last
        if last is None or self._steps[-1] == last[0]:
            return self._steps, self._values
        return np.append(self._steps, last[0]), np.append(self._values, last[1])

    def _fold(self) -> None:
        if not self._new_steps:
            return
        steps = np.array(self._new_steps, dtype=np.float64)
        values = np.array(self._new_values, dtype=np.float64)
        self._new_steps, self._new_values = [], []
        self._stats.add(steps, values)
        self._steps, self._values = np.append(self._steps, steps), np.append(self._values, values)
        self.width = wide_enough(self._steps, self.width, EXACT, FEW)
        if self.width > 1:
            kept = extremes(self._steps, self._values, self.width)
            self._steps, self._values = self._steps[kept], self._values[kept]


def wide_enough(steps: Floats, width: int, exact: int, few: int) -> int:
    """The width of buckets: 1 up to `exact` steps, else `width` doubled until there are at most `few`.

    Args:
        steps: ascending.
    """
    if width == 1 and len(steps) <= exact:
        return 1
    while np.count_nonzero(np.diff(steps // width)) + 1 > few:
        width *= 2
    return width


def extremes(steps: Floats, values: Floats, width: int) -> NDArray[np.intp]:
    """Places of each bucket's least, greatest and first not finite value, ascending."""
    bucket = steps // width
    finite = np.flatnonzero(np.isfinite(values))
    by_value = finite[np.lexsort((steps[finite], values[finite], bucket[finite]))]
    least, greatest = ends_of_groups(bucket[by_value])
    bad = np.flatnonzero(~np.isfinite(values))
    first_bad, _ = ends_of_groups(bucket[bad])
    return np.unique(np.concatenate([by_value[least], by_value[greatest], bad[first_bad]]))


def ends_of_groups(groups: Floats) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """First and last places of runs of equal numbers."""
    if not len(groups):
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
    changes = np.flatnonzero(np.diff(groups))
    return np.append(0, changes + 1), np.append(changes, len(groups) - 1)
