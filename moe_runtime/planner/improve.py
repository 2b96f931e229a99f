"""Making rows better by small changes, one at a time: local search.

The makespan is the length of a critical path: entries each of which starts the moment its forerunner
ends (the entry before it on its rank, or the maker of what it needs). Only a change to the path can
shorten the step, so every change is made there: an entry moves along its row, an overlap is taken
apart, or an F and an I are joined into one.

Most changes leave the makespan as it is, since there are many critical paths; going sideways is how
the search gets from one improvement to the next. So what is compared is the makespan plus a trifle of
the mean time at which ranks end, and a change is taken if it is no worse than what was there some
changes ago (late acceptance, Burke & Bykov 2017): one number to set, and no temperature to tune.
"""

import math
import random
from collections.abc import Iterator

from moe_runtime.planner.instance import B, F, I, Instance, Rows, W

_SLACK = 1e-9
_MEMORY = 60  # how many changes ago is compared with
_TRIFLE = 0.02  # weight of the mean end of ranks


def peak_live(instance: Instance, row: list[int]) -> float:
    """Most live memory in a row, as `schedule.check` counts it."""
    live = peak = 0.0
    for entry in row:
        actions = instance.parts(entry)
        for action in actions:
            if action % 4 == F:
                live += instance.live[action // 4 // instance.micros]
        peak = max(peak, live)
        for action in actions:
            if action % 4 >= W:
                live -= instance.live[action // 4 // instance.micros]
    return peak


def improve(
    instance: Instance, rows: Rows, cap: float, changes: int, seed: int = 0, target: float = -math.inf
) -> Rows:
    """Rows that take no longer and keep to the cap.

    Args:
        rows: free of deadlock, within the cap, and without a B outside of overlaps.
        changes: how many to try.
        target: a makespan at which to stop.
    """
    search = _Search(instance, rows, cap, random.Random(seed))
    for _ in range(changes):
        if search.best <= target + _SLACK:
            break
        search.step()
    return search.best_rows


class _Search:
    """Where a local search is, and the best it has seen."""

    def __init__(self, instance: Instance, rows: Rows, cap: float, rng: random.Random) -> None:
        self.instance, self.cap, self.rng = instance, cap + _SLACK, rng
        self.rows = [list(row) for row in rows]
        self.merit, self.best, self.starts, self.ends = self._measure(self.rows)
        self.best_rows = [list(row) for row in rows]
        self.history = [self.merit] * _MEMORY
        self.count = 0
        self.path = list(self._critical_path())

    def _measure(self, rows: Rows) -> tuple[float, float, list[list[float]], list[list[float]]]:
        makespan, starts, ends = self.instance.clock(rows)
        if makespan == math.inf:
            return math.inf, math.inf, starts, ends
        mean = sum(row[-1] for row in ends) / len(ends)
        return makespan + _TRIFLE * mean, makespan, starts, ends

    def step(self) -> None:
        """Try one change."""
        self.count += 1
        rank, position = self.rng.choice(self.path)
        row = self._changed(self.rows[rank], position)
        if row is None or peak_live(self.instance, row) > self.cap:
            return
        before, self.rows[rank] = self.rows[rank], row
        merit, makespan, starts, ends = self._measure(self.rows)
        slot = self.count % _MEMORY
        if merit > self.merit + _SLACK and merit > self.history[slot]:
            self.rows[rank] = before
            return
        self.merit = self.history[slot] = merit
        self.starts, self.ends = starts, ends
        self.path = list(self._critical_path())
        if makespan < self.best - _SLACK:
            self.best = makespan
            self.best_rows = [list(each) for each in self.rows]

    def _critical_path(self) -> Iterator[tuple[int, int]]:
        """(rank, position) of the entries of one critical path, from its end."""
        instance = self.instance
        made_at = {}
        for rank, row in enumerate(self.rows):
            for position, entry in enumerate(row):
                for action in instance.parts(entry):
                    made_at[instance.makes[action]] = (rank, position)
        ranks = range(len(self.rows))
        rank = max(ranks, key=lambda each: self.ends[each][-1])
        position = len(self.rows[rank]) - 1
        while True:
            yield rank, position
            start = self.starts[rank][position]
            if position > 0 and self.ends[rank][position - 1] >= start - _SLACK:
                position -= 1
                continue
            needs = [instance.need[action] for action in instance.parts(self.rows[rank][position])]
            makers = [made_at[need] for need in needs if need in made_at]
            if not makers:
                return
            rank, position = max(makers, key=lambda each: self.ends[each[0]][each[1]])

    def _changed(self, row: list[int], position: int) -> list[int] | None:
        """The row after a random change at a position; None if there is none to make."""
        if row[position] >= self.instance.num_actions and self.rng.random() < 0.3:
            return self._split(row, position)
        if (
            row[position] % 4 in (F, I)
            and row[position] < self.instance.num_actions
            and self.rng.random() < 0.3
        ):
            return self._join(row, position)
        return self._move(row, position)

    def _move(self, row: list[int], position: int) -> list[int] | None:
        """The entry some places earlier or later."""
        far = 1 + int(self.rng.expovariate(0.4))
        to = position + (far if self.rng.random() < 0.4 else -far)
        to = max(0, min(len(row) - 1, to))
        entry = row[position]
        passed = row[position + 1 : to + 1] if to > position else row[to:position]
        if (
            not passed
            or (entry % 4 == I and entry - I + W in passed)
            or (entry % 4 == W and entry - W + I in passed)
        ):
            return None
        changed = row[:position] + row[position + 1 :]
        changed.insert(to, entry)
        return changed

    def _split(self, row: list[int], position: int) -> list[int]:
        """An overlap as an F and an I, in either order, and a W."""
        forward, backward = self.instance.parts(row[position])
        apart = [forward, backward - B + I]
        if self.rng.random() < 0.5:
            apart.reverse()
        return [*row[:position], *apart, backward - B + W, *row[position + 1 :]]

    def _join(self, row: list[int], position: int) -> list[int] | None:
        """An overlap of an F or I with the nearest I or F, at the place of either."""
        instance = self.instance
        wanted = I if row[position] % 4 == F else F
        near = range(max(0, position - 8), min(len(row), position + 9))
        partners = [each for each in near if row[each] < instance.num_actions and row[each] % 4 == wanted]
        if not partners:
            return None
        partner = min(partners, key=lambda each: abs(each - position))
        forward, backward = (row[position], row[partner]) if wanted == I else (row[partner], row[position])
        if instance.gain[forward // 4 // instance.micros][backward // 4 // instance.micros] <= _SLACK:
            return None
        dropped = {forward, backward, backward - I + W}
        place, other = self.rng.sample((position, partner), 2)
        kept = [
            instance.overlap(forward, backward - I + B) if at == place else entry
            for at, entry in enumerate(row)
            if at != other
        ]
        return [entry for entry in kept if entry not in dropped]
