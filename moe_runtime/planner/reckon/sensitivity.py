"""Which figures of a cluster file a plan hangs on: each moved alone from its low to its high end.

A curve is one figure; all its points move together. The rest stays central.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from moe_runtime.planner.hardware.cluster import Cluster

_ENDS = ("low", "high")


@dataclass(frozen=True)
class Moved:
    """What a figure does.

    Args:
        figure: its dotted key in the cluster file.
        low, high: tokens/s/GPU with it at either end, over those with it central, less one.
    """

    figure: str
    low: float
    high: float

    @property
    def width(self) -> float:
        """The largest change."""
        return max(abs(self.low), abs(self.high))


def sensitivity(cluster: Cluster, rate: Callable[[Cluster], float]) -> list[Moved]:
    """What every figure with a range does to a rate, the largest first.

    Args:
        rate: of a plan on a cluster, in the central world.
    """
    values, central = cluster.model_dump(), rate(cluster)
    found = []
    for path in _figures(values, ()):
        changes = [rate(Cluster.model_validate(_moved(values, path, end))) / central - 1 for end in _ENDS]
        found.append(Moved(".".join(path), *changes))
    return sorted(found, key=lambda one: -one.width)


def _figures(values: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Paths of estimates and curves that have a range; failures and price do not move a rate."""
    if not isinstance(values, dict) or path[:1] in (("failures",), ("price_usd_hour",)):
        return
    if "central" in values:
        if values["low"] != values["high"]:
            yield path
    elif "points" in values:
        if any(point["value"]["low"] != point["value"]["high"] for point in values["points"]):
            yield path
    else:
        for key, value in values.items():
            yield from _figures(value, (*path, key))


def _moved(values: dict[str, Any], path: tuple[str, ...], end: str) -> dict[str, Any]:
    """A copy with the figure at one end."""
    if not path:
        return _at_end(values, end)
    return {**values, path[0]: _moved(values[path[0]], path[1:], end)}


def _at_end(figure: dict[str, Any], end: str) -> dict[str, Any]:
    if "points" in figure:
        return {
            **figure,
            "points": [{**one, "value": _at_end(one["value"], end)} for one in figure["points"]],
        }
    return {**figure, "low": figure[end], "central": figure[end], "high": figure[end]}
