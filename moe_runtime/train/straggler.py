"""Which rank is slow: its own work in a step, without its waits, against the ranks that do the same work.

A slow rank makes all ranks slow, so the time of a step does not tell which. What a rank does between its
waits does. Ranks that hold the same stages (data-parallel replicas, mirrored rows) have the same to do; each
is compared with the median of the others. Where a rank has no such peer it is compared with its own first
steps, and the ratio with that of the other ranks, so that a larger batch makes nobody slow.

Where a machine has fewer processors than ranks, they take turns, and the turns are not even. There the time
in which a rank is ready and has no processor is no work of its own; elsewhere it is what makes it slow.

One slow step proves nothing: processors are shared, routing is uneven. A rank is told when it was over the
ratio in all but two of the last nine steps, and again when it has been below it as long.

On a GPU the host's clock says nothing of the device's work, and nothing is told.
"""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

_WINDOW = 9
_ENOUGH = 7  # steps of the window
_FIRST_STEPS = 5  # whose median is what a rank without peers is compared with


@dataclass(frozen=True)
class Straggler:
    """A rank that has become slow, or is so no more.

    Args:
        rank: global.
        ratio: its own work over what was expected, median of the last steps.
        is_slow: it is now; else it was.
    """

    rank: int
    ratio: float
    is_slow: bool


class StragglerWatch:
    """Compares the work of ranks, step by step; alike on every rank.

    Args:
        peers: for each rank, all ranks that have the same to do, itself among them.
        ratio: above which a rank is slow.
    """

    def __init__(self, peers: Sequence[Sequence[int]], ratio: float) -> None:
        self._others = [[other for other in group if other != rank] for rank, group in enumerate(peers)]
        self._limit = ratio
        self._ratios: list[deque[float]] = [deque(maxlen=_WINDOW) for _ in peers]
        self._first: list[list[float]] = [[] for _ in peers]
        self._slow: set[int] = set()

    @property
    def worst(self) -> tuple[float, int | None]:
        """The largest median ratio and the rank that it is of; 1 and None while nothing is known."""
        medians = [(statistics.median(ratios), rank) for rank, ratios in enumerate(self._ratios) if ratios]
        return max(medians, key=lambda found: found[0], default=(1.0, None))

    def update(self, work_s: Sequence[float]) -> list[Straggler]:
        """Take a step; gives what has changed.

        Args:
            work_s: own work of each rank, seconds.
        """
        for rank, ratio in self._compare(work_s).items():
            self._ratios[rank].append(ratio)
        return [change for rank in range(len(self._ratios)) if (change := self._judge(rank)) is not None]

    def _compare(self, work_s: Sequence[float]) -> dict[int, float]:
        """Each rank's ratio, where there is something to compare it with."""
        found = {}
        own = self._against_first(work_s)
        for rank, others in enumerate(self._others):
            if others:
                found[rank] = work_s[rank] / max(1e-9, statistics.median(work_s[other] for other in others))
            elif own and len(own) > 1:
                rest = statistics.median(ratio for other, ratio in enumerate(own) if other != rank)
                found[rank] = own[rank] / max(1e-9, rest)
        return found

    def _against_first(self, work_s: Sequence[float]) -> list[float]:
        """Each rank's work over that of its own first steps; empty until there are enough."""
        if len(self._first[0]) < _FIRST_STEPS:
            for seconds, first in zip(work_s, self._first, strict=True):
                first.append(seconds)
            return []
        pairs = zip(work_s, self._first, strict=True)
        return [seconds / max(1e-9, statistics.median(first)) for seconds, first in pairs]

    def _judge(self, rank: int) -> Straggler | None:
        ratios = self._ratios[rank]
        over = sum(ratio > self._limit for ratio in ratios)
        is_slow = over >= _ENOUGH or (rank in self._slow and over > _WINDOW - _ENOUGH)
        if is_slow == (rank in self._slow):
            return None
        self._slow ^= {rank}
        return Straggler(rank, statistics.median(ratios), is_slow)


def peers_of(groups: Sequence[Sequence[int]], world_size: int) -> list[list[int]]:
    """For each rank the group it is in."""
    by_rank = {rank: list(group) for group in groups for rank in group}
    return [by_rank[rank] for rank in range(world_size)]
