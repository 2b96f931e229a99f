"""The search for the best rows of one placement: explore recipes, then polish the best of their rows.

Effort is counted in entries walked, never in seconds, and chance comes from a fixed seed: every rank of
a run that searches finds the same program.
"""

import math
from random import Random
from typing import TypeVar

from moe_runtime.planner.bound import lower_bound
from moe_runtime.planner.improve import improve, peak_live
from moe_runtime.planner.instance import B, I, Instance, Rows, W
from moe_runtime.planner.list_schedule import Policy
from moe_runtime.planner.recipes import Recipe, draw, follow, proven, vary
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.passes import split_backward

_Kind = TypeVar("_Kind")

_SLACK = 1e-9
_KEPT = 3  # rows that are polished
_FRESH = 28  # recipes drawn before any is varied
# Steps of equal length, about half a microsecond, for each entry that is ...
_LISTED, _REPEATED, _EVALUATED, _CHANGED = 20.0, 4.0, 1.0, 2.5


class Hunt:
    """The best rows found so far for an instance and a cap.

    Attributes:
        makespan: of the best rows; infinite before the first.
        bound: what no rows can beat.
    """

    def __init__(self, instance: Instance, cap: float) -> None:
        self.instance, self.cap = instance, cap
        self.bound = lower_bound(instance, None if cap == math.inf else cap)
        self.size = 3.0 * instance.num_lanes * instance.micros
        self.rng = Random(0)
        self.kept: list[tuple[float, Rows]] = []
        self.recipes: list[tuple[float, Recipe]] = []
        self.proven = proven(instance, cap)
        self.drawn = 0

    @property
    def makespan(self) -> float:
        return self.kept[0][0] if self.kept else math.inf

    @property
    def is_done(self) -> bool:
        """True once the bound is reached."""
        return self.makespan <= self.bound + _SLACK

    def add(self, program: Program) -> None:
        """Take a program of this placement, without transfers, as a starting point if it fits the cap."""
        self._keep(self.instance.rows(split_backward(program)))

    def explore(self, steps: float) -> None:
        """Follow recipes, new ones and variations of the best, for about so many steps."""
        while steps > 0 and not self.is_done:
            if self.drawn < len(self.proven):
                recipe = self.proven[self.drawn]
            elif self.drawn < _FRESH or not self.recipes or self.rng.random() < 0.4:
                recipe = draw(self.rng, self.instance, self.cap)
            else:
                base = self.recipes[self.rng.randrange(len(self.recipes))][1]
                recipe = vary(self.rng, self.instance, base, self.cap)
            self.drawn += 1
            makespan = self._keep(follow(self.instance, recipe, self.cap))
            self.recipes = _kept(self.recipes, makespan, recipe)
            steps -= self.size * (_EVALUATED + (_LISTED if isinstance(recipe, Policy) else _REPEATED))

    def polish(self, steps: float) -> None:
        """Improve the best rows by small changes, for about so many steps."""
        changes = int(steps / (self.size * _CHANGED * max(1, len(self.kept))))
        for seed, (_, rows) in enumerate(list(self.kept)):
            if not self.is_done:
                self._keep(improve(self.instance, rows, self.cap, changes, seed, self.bound))

    def best(self) -> Rows:
        """The best rows, with I and W in one wherever that costs nothing."""
        return _join_backward(self.instance, self.kept[0][1])

    def _keep(self, rows: Rows) -> float:
        """Keep rows if they fit and are among the best; their makespan, infinite if they do not fit."""
        if any(peak_live(self.instance, row) > self.cap + _SLACK for row in rows):
            return math.inf
        makespan = self.instance.evaluate(rows)
        self.kept = _kept(self.kept, makespan, rows)
        return makespan


def _kept(kept: list[tuple[float, _Kind]], makespan: float, one: _Kind) -> list[tuple[float, _Kind]]:
    """The best of what was kept and one more; of equals, which are mostly twins, the last."""
    if makespan == math.inf:
        return kept
    others = [each for each in kept if abs(makespan - each[0]) > _SLACK]
    return sorted([*others, (makespan, one)], key=lambda each: each[0])[:_KEPT]


def _join_backward(instance: Instance, rows: Rows) -> Rows:
    """Make a B of every I that its W follows at once, where the step gets no longer for it.

    A backward in one piece is what an executor does best: nothing has to be kept for later.
    """
    makespan = instance.evaluate(rows) + _SLACK
    cuts = [
        (rank, row[position])
        for rank, row in enumerate(rows)
        for position in range(len(row) - 1)
        if row[position] < instance.num_actions
        and row[position] % 4 == I
        and row[position + 1] == row[position] - I + W
    ]
    pending = [cuts]
    while pending:
        group = pending.pop()
        joined = _joined(rows, group)
        if instance.evaluate(joined) <= makespan:
            rows = joined
        elif len(group) > 1:
            half = len(group) // 2
            pending += [group[half:], group[:half]]
    return rows


def _joined(rows: Rows, group: list[tuple[int, int]]) -> Rows:
    joined = [list(row) for row in rows]
    for rank in {rank for rank, _ in group}:
        inputs = {number for of, number in group if of == rank}
        weights = {number - I + W for number in inputs}
        joined[rank] = [n - I + B if n in inputs else n for n in joined[rank] if n not in weights]
    return joined
