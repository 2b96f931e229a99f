"""A figure that nobody knows exactly: low, central and high, and where it is from.

    price_usd: 2.0                                                   known
    hbm_gbps: {low: 2600, central: 2900, high: 3000, source: ...}    a published range

A plan is made in one of three worlds: every figure at its central value, or all of them at the end that makes
the run slower, or all at the end that makes it faster. Which end that is depends on the figure: a rate makes
a run faster when it is high, a latency or a price when it is low.

A `Curve` is an estimate that depends on a size, such as the efficiency of a product on its inner width:
between the sizes that were published it goes in a straight line over the logarithm of the size, beyond them
it stays.
"""

import bisect
import math
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from moe_runtime.config.finding import Finding
from moe_runtime.config.section import Section

World = Literal["slow", "central", "fast"]
WORLDS: tuple[World, ...] = ("slow", "central", "fast")


class Estimate(Section):
    """A figure with its published range; a number alone is a range without width."""

    low: float
    central: float
    high: float
    source: str = Field("", description="document and section, or the command that measured it")

    @model_validator(mode="before")
    @classmethod
    def _number_alone(cls, value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return {"low": value, "central": value, "high": value}
        return value

    def findings(self) -> list[Finding]:
        """Not negative, and in order."""
        if not 0 <= self.low <= self.central <= self.high:
            got = f"{self.low:g}, {self.central:g}, {self.high:g}"
            return [Finding.expected("low", "0 <= low <= central <= high", got)]
        return []

    def rate(self, world: World) -> float:
        """Its value if more of it makes a run faster."""
        return {"slow": self.low, "central": self.central, "fast": self.high}[world]

    def burden(self, world: World) -> float:
        """Its value if more of it makes a run slower or dearer."""
        return {"slow": self.high, "central": self.central, "fast": self.low}[world]


class CurvePoint(Section):
    """The figure at one size."""

    size: float = Field(gt=0)
    value: Estimate


class Curve(Section):
    """A figure over sizes, such as {source: ..., points: [{size: 512, value: 0.38}, ...]}."""

    points: tuple[CurvePoint, ...] = Field(min_length=1)
    source: str = ""

    def findings(self) -> list[Finding]:
        """Sizes rise."""
        sizes = [point.size for point in self.points]
        if any(a >= b for a, b in pairwise(sizes)):
            return [Finding.expected("points", "rising sizes", sizes)]
        return []

    def rate(self, size: float, world: World) -> float:
        """Its value at a size, if more of it makes a run faster."""
        sizes = [point.size for point in self.points]
        place = bisect.bisect_right(sizes, size)
        if place == 0 or place == len(sizes):
            return self.points[min(place, len(sizes) - 1)].value.rate(world)
        below, above = self.points[place - 1], self.points[place]
        share = math.log(size / below.size) / math.log(above.size / below.size)
        return below.value.rate(world) * (1 - share) + above.value.rate(world) * share
