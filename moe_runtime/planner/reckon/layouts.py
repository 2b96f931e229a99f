"""The best layout of a run on so many accelerators: all that are legal looked at, few of them simulated.

    frames     every layout and batch, judged by the rules of `train`                    (`space.py`)
    memory     of each of them with each recompute and format of moments; must fit       (`layout_memory.py`)
    bound      what the step takes at least                                              (`layout_times.py`)
    simulate   in the order of bounds, the lowest first

A layout is simulated unless it is settled without: `top` layouts are known to be faster than its bound, and
one that needs no more memory is faster than its bound too. So the ranking down to place `top` and the front
are exactly those of simulating everything, whatever the costs: a bound that is too low costs time and no
layout. A test holds the one against the other.

    front      layouts to which no other is better in memory and time at once

Two layouts of equal time: the one that needs less memory goes first.
"""

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from moe_runtime.config.derive import tokens_per_step
from moe_runtime.config.schema import RecomputeConfig, RunConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import World
from moe_runtime.planner.reckon.layout_memory import LayoutMemory
from moe_runtime.planner.reckon.layout_times import LayoutTimes
from moe_runtime.planner.reckon.room import check_room
from moe_runtime.planner.reckon.space import MOMENTS, Frame, Refusal, frames, recomputes

GIGA = 1e9
TOP = 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """A legal layout with its choices.

    Args:
        nbytes: that its fullest pipeline rank needs.
        rank: that one.
    """

    frame: Frame
    recompute: RecomputeConfig
    moments: str
    nbytes: float
    rank: int

    @property
    def config(self) -> RunConfig:
        """The whole run."""
        return self.frame.with_choices(self.recompute, self.moments)


@dataclass(frozen=True, slots=True)
class Ranked:
    """A layout that fits.

    Args:
        seconds: of a step; at least so many if it is not `exact`.
    """

    candidate: Candidate
    seconds: float
    exact: bool

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """In a step of the full batch; at most so many if it is not `exact`."""
        frame = self.candidate.frame
        return tokens_per_step(frame.config) / self.seconds / frame.layout.world_size


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found.

    Args:
        ranked: layouts that fit, the fastest first; from place `top` on those that were not simulated come
            in the order of their bounds, behind the others.
        front: from the fastest to the one that needs the least memory.
        refused: layouts that `train` would refuse, with the reason.
        too_large: legal layouts that do not fit, those that need the least first.
        simulated: programs that were put on a clock.
    """

    config: RunConfig
    cluster: Cluster
    num_accelerators: int
    world: World
    ranked: tuple[Ranked, ...]
    front: tuple[Ranked, ...]
    refused: tuple[Refusal, ...]
    too_large: tuple[Candidate, ...]
    simulated: int

    @property
    def limit(self) -> float:
        """Bytes of an accelerator."""
        return self.cluster.accelerator.memory_gb * GIGA

    @property
    def num_legal(self) -> int:
        """Layouts that `train` would start."""
        return len(self.ranked) + len(self.too_large)

    @property
    def num_refused(self) -> int:
        """Layouts that it would not."""
        return sum(one.count for one in self.refused)


def search_layouts(
    config: RunConfig,
    cluster: Cluster,
    num_accelerators: int,
    world: World = "central",
    *,
    imbalance: float = 1.0,
    top: int = TOP,
    exhaustive: bool = False,
) -> Search:
    """Look at every layout.

    Args:
        num_accelerators: that the run shall have; its own pp and dp do not matter.
        imbalance: rows that the fullest rank's experts get, over the mean.
        top: places of the ranking that shall be exact.
        exhaustive: simulate every layout that fits; to check the search against.

    Raises:
        ConfigError: the weights alone are more than all accelerators hold.
    """
    check_room(config, cluster, num_accelerators)
    times = LayoutTimes(cluster, world, imbalance)
    choices, refused = recomputes(config)
    legal: list[Frame] = []
    for frame in frames(config, num_accelerators):
        if isinstance(frame, Frame):
            legal.append(frame)
        else:
            refused.append(frame)
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    limit = cluster.accelerator.memory_gb * GIGA
    for candidate in _weighed(config, legal, choices, times, imbalance):
        (fitting if candidate.nbytes <= limit else too_large).append(candidate)
    ranked = _ranked(fitting, times, len(fitting) if exhaustive else top)
    return Search(
        config=config,
        cluster=cluster,
        num_accelerators=num_accelerators,
        world=world,
        ranked=tuple(ranked),
        front=tuple(front_of(one for one in ranked if one.exact)),
        refused=tuple(refused),
        too_large=tuple(sorted(too_large, key=lambda one: one.nbytes)),
        simulated=times.num_simulated,
    )


def front_of(ranked: Iterable[Ranked]) -> list[Ranked]:
    """Those to which no other is better in memory and time at once, the fastest first.

    Args:
        ranked: the fastest first, of equal ones those that need less memory.
    """
    found: list[Ranked] = []
    for one in ranked:
        if not found or one.candidate.nbytes < found[-1].candidate.nbytes:
            found.append(one)
    return found


def _weighed(
    config: RunConfig,
    legal: Iterable[Frame],
    choices: list[RecomputeConfig],
    times: LayoutTimes,
    imbalance: float,
) -> Iterator[Candidate]:
    memory = LayoutMemory(config, imbalance)
    for frame in legal:
        digest = times.digest(frame)
        for recompute in choices:
            for moments in MOMENTS:
                totals = memory.totals(frame, digest, recompute, moments)
                nbytes = max(totals)
                yield Candidate(frame, recompute, moments, nbytes, totals.index(nbytes))


def _ranked(fitting: list[Candidate], times: LayoutTimes, top: int) -> list[Ranked]:
    """Simulates what has to be, in the order of bounds."""
    bounds = [(times.at_least(one.frame, one.recompute, one.moments), one.nbytes) for one in fitting]
    order = sorted(range(len(fitting)), key=bounds.__getitem__)
    done, bounded = _Done(top), []
    for place in order:
        one, (least, nbytes) = fitting[place], bounds[place]
        if done.settles(least, nbytes):
            bounded.append(Ranked(one, least, exact=False))
        else:
            seconds = times.simulated(one.frame, one.recompute, one.moments)
            done.add(Ranked(one, seconds, exact=True))
    return [*done.in_order(), *bounded]


class _Done:
    """Layouts that were simulated: the times of the best, and the front so far."""

    def __init__(self, top: int) -> None:
        self._top = top
        self._all: list[Ranked] = []
        self._best: list[float] = []
        self._least_memory: list[tuple[float, float]] = []  # of the front: (seconds, bytes), rising, falling

    def add(self, one: Ranked) -> None:
        """Take in one more."""
        self._all.append(one)
        bisect.insort(self._best, one.seconds)
        del self._best[self._top :]
        self._least_memory = _stairs([*self._least_memory, (one.seconds, one.candidate.nbytes)])

    def settles(self, least: float, nbytes: float) -> bool:
        """Whether a layout with this bound is neither among the best nor on the front."""
        if len(self._best) < self._top or least <= self._best[-1]:
            return False
        return any(seconds < least and held <= nbytes for seconds, held in self._least_memory)

    def in_order(self) -> list[Ranked]:
        """The fastest first."""
        return sorted(self._all, key=lambda one: (one.seconds, one.candidate.nbytes))


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The front of (seconds, bytes)."""
    found: list[tuple[float, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found
