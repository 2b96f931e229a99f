"""Loads of all experts over time, cut to what a page can hold, and the experts that are dead.

A file has up to a thousand times; of 61 layers with 256 experts that is 16 million numbers. So neighbouring
times become one frame, which has two pictures: the mean of its times, which shows what lasts, and of each
expert the load furthest from a fair share (by ratio), which shows what happened once. Where every time has a
frame of its own, the two are one.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moe_runtime.metrics.heatmap import Heatmap

DEAD = 0.01  # of a fair share; below it an expert learns nothing
_MOST_CELLS = 1_200_000  # of all frames together
_SMALLEST = 1 / 512  # half the smallest load that the file can tell from none
_MOST_DEAD = 200


@dataclass(frozen=True)
class Frames:
    """What the page holds of the loads.

    Args:
        first_steps, last_steps: of each frame.
        layers: prefixes.
        mean, furthest: float32 [frames, layers, experts]; 1 is a fair share. The same object if every time
            has a frame of its own.
    """

    first_steps: list[int]
    last_steps: list[int]
    layers: list[str]
    mean: NDArray[np.float32]
    furthest: NDArray[np.float32]


@dataclass(frozen=True)
class DeadExpert:
    """An expert without work at the end.

    Args:
        since: step of the first of the times, up to the last one, at all of which it was dead.
    """

    layer: str
    expert: int
    since: int


def frames_of(heatmap: Heatmap, most_cells: int = _MOST_CELLS) -> Frames | None:
    """The frames of a run; None if it has no times."""
    times, layers, experts = heatmap.load.shape
    if not (times and layers and experts):
        return None
    if heatmap.load.size <= most_cells:
        return Frames(heatmap.steps, heatmap.steps, heatmap.layers, heatmap.load, heatmap.load)
    count = max(1, most_cells // (2 * layers * experts))
    firsts = np.unique(np.linspace(0, times, count, endpoint=False).astype(int))
    ends = np.append(firsts[1:], times)
    groups = [heatmap.load[first:end] for first, end in zip(firsts, ends, strict=True)]
    return Frames(
        first_steps=[heatmap.steps[first] for first in firsts],
        last_steps=[heatmap.steps[end - 1] for end in ends],
        layers=heatmap.layers,
        mean=np.stack([group.mean(axis=0) for group in groups]),
        furthest=np.stack([_furthest(group) for group in groups]),
    )


def dead_experts(heatmap: Heatmap) -> tuple[list[DeadExpert], int]:
    """Experts that are dead at the last time, first layers first, and how many are not listed."""
    if not heatmap.steps:
        return [], 0
    found = []
    for layer, expert in np.argwhere(heatmap.load[-1] < DEAD):
        alive = np.flatnonzero(heatmap.load[:, layer, expert] >= DEAD)
        begun = int(alive[-1]) + 1 if len(alive) else 0
        found.append(DeadExpert(heatmap.layers[layer], int(expert), heatmap.steps[begun]))
    return found[:_MOST_DEAD], max(0, len(found) - _MOST_DEAD)


def _furthest(group: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of [times, layers, experts] the load of each expert that is furthest from 1, by ratio."""
    place = np.abs(np.log2(np.maximum(group, _SMALLEST))).argmax(axis=0)
    return np.take_along_axis(group, place[None], axis=0)[0]
