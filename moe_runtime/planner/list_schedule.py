"""Writing a program by walking through time: whenever a rank is free, it takes the best thing at hand.

What is best is a `Policy`, a handful of numbers; the search tries many. In falling order of urgency:

    overlap     an F with a B, if that hides exchange; a partner that is about to arrive is waited for
    I           input gradients, which other ranks wait for
    F           forwards, as long as memory and the rank's warm-up depth allow
    W           weight gradients, which nobody waits for: they fill what would be idle time

A B is cut into I and W wherever it is not overlapped; joining those that need not be cut is for
`improve`. Stages take their microbatches in order.

Memory. A forward that fits the cap may still lead into a deadlock: if young microbatches fill a rank,
the eldest cannot come through it to its end, where its memory would be freed. So room is kept for the
eldest: on each rank the forwards of all microbatches but the eldest unfinished one, and all stages of
that one, fit the cap together. Then the eldest of the whole pipeline can always go on, on every rank
it comes to, after W's that are owed; when it has ended, so can the next. The least cap is therefore
what one microbatch holds on a rank. This is the banker's rule, with age as the order of completion.
"""

import math
from collections import deque
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from moe_runtime.planner.instance import B, F, I, Instance, Rows, W

_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Policy:
    """What a free rank prefers.

    Args:
        depth: per rank, memory up to which an F may run alone.
        forward_deep, backward_deep: how much a later stage counts in the choice among a rank's stages,
            against one microbatch of age; may be negative.
        pair_patience: time that a rank waits for the partner of an overlap.
        grad_patience: time that a rank leaves an F or a W aside for a gradient about to arrive.
        weight_delay: time that a W may hold up what is about to arrive.
        owed: memory in owed W's from which a W comes before anything else.
        forward_first: prefer F to I when both are at hand and do not overlap.
    """

    depth: tuple[float, ...]
    forward_deep: float = 0.0
    backward_deep: float = 0.0
    pair_patience: float = 0.0
    grad_patience: float = 0.0
    weight_delay: float = 0.0
    owed: float = math.inf
    forward_first: bool = False


def list_schedule(instance: Instance, policy: Policy, cap: float = math.inf) -> Rows:
    """The rows that a policy leads to; their clock is that of `Instance.clock`.

    Args:
        cap: most live memory on a rank, at least `least_cap`.
    """
    ranks = [_Rank(instance, rank, policy, cap) for rank in range(instance.num_ranks)]
    arrivals = [math.inf] * (instance.for_none + 1)
    arrivals[instance.at_start] = 0.0
    wakes = [(0.0, rank) for rank in range(instance.num_ranks)]
    heapify(wakes)
    while wakes:
        now, rank = heappop(wakes)
        state = ranks[rank]
        if now < state.free_at:
            continue
        entry = state.choose(now, arrivals)
        if entry is None:
            continue
        for product, arrival in state.run(now, entry):
            arrivals[product] = arrival
            user = instance.user[product]
            if user >= 0:
                heappush(wakes, (arrival, user))
        heappush(wakes, (state.free_at, rank))
    assert all(state.is_through for state in ranks), f"the eldest microbatch found no room under {cap}"
    return [state.row for state in ranks]


def least_cap(instance: Instance) -> float:
    """The least cap for which there is a program: what one microbatch holds on a rank, at most."""
    stages = instance.num_stages
    held = [0.0] * (instance.num_ranks * len(instance.placement))
    for lane, rank in enumerate(instance.rank_of):
        held[lane // stages * instance.num_ranks + rank] += instance.live[lane]
    return max(held)


class _Rank:
    """One rank: how far its lanes have come, and what it holds."""

    def __init__(self, instance: Instance, rank: int, policy: Policy, cap: float) -> None:
        self.instance, self.policy, self.cap = instance, policy, cap + _SLACK
        self.lanes = instance.lanes_of[rank]
        self.depth = policy.depth[rank] + _SLACK
        self.forwards = dict.fromkeys(self.lanes, 0)
        self.backwards = dict.fromkeys(self.lanes, 0)
        self.owed: deque[int] = deque()
        self.owed_memory = self.live = 0.0
        self.row: list[int] = []
        self.free_at = self.comm_free_at = 0.0

    @property
    def is_through(self) -> bool:
        """True once all its work is done."""
        return not self.owed and min(self.backwards.values()) == self.instance.micros

    def choose(self, now: float, arrivals: list[float]) -> int | None:
        """The entry to start now; None to wait for the next arrival."""
        if self.owed and self.owed_memory > self.policy.owed:
            return self.owed[0]
        forwards, backwards = self._forwards(arrivals), self._backwards(arrivals)
        start, pair = self._best_pair(now, forwards, backwards)
        if pair is not None:
            return pair if start <= now else self._filler(now, start)
        forward = self._best_forward(now, forwards)
        backward = max((each for each in backwards if each[1] <= now), default=None)
        if backward is not None and (forward is None or not self.policy.forward_first):
            return self.instance.number(backward[2], self.backwards[backward[2]], I)
        soon = min((arrival for _, arrival, _ in backwards), default=math.inf)
        if backward is None and soon <= now + self.policy.grad_patience:
            return self._filler(now, soon)
        if forward is not None:
            return self.instance.number(forward, self.forwards[forward], F)
        return self._filler(now, math.inf)

    def _forwards(self, arrivals: list[float]) -> list[tuple[float, float, int]]:
        """(merit, arrival, lane) of every forward that is on its way and fits."""
        instance, found = self.instance, []
        for lane in self.lanes:
            micro = self.forwards[lane]
            if micro < instance.micros:
                arrival = arrivals[instance.need[instance.number(lane, micro, F)]]
                if arrival < math.inf and self._fits(lane, micro):
                    deep = self.policy.forward_deep * (lane % instance.num_stages)
                    found.append((deep - micro, arrival, lane))
        return found

    def _backwards(self, arrivals: list[float]) -> list[tuple[float, float, int]]:
        """(merit, arrival, lane) of every backward that is on its way."""
        instance, found = self.instance, []
        for lane in self.lanes:
            micro = self.backwards[lane]
            if micro < self.forwards[lane]:
                arrival = arrivals[instance.need[instance.number(lane, micro, I)]]
                if arrival < math.inf:
                    deep = self.policy.backward_deep * (lane % instance.num_stages)
                    found.append((deep - micro, arrival, lane))
        return found

    def _best_pair(
        self, now: float, forwards: list[tuple[float, float, int]], backwards: list[tuple[float, float, int]]
    ) -> tuple[float, int | None]:
        """The overlap to start next and when, or none that gains and is near enough."""
        instance, best, chosen = self.instance, (-math.inf, -math.inf), None
        for forward_merit, forward_at, forward in forwards:
            for backward_merit, backward_at, backward in backwards:
                start = max(now, forward_at, backward_at)
                if start > now + self.policy.pair_patience or instance.gain[forward][backward] <= _SLACK:
                    continue
                merit = (-start, forward_merit + backward_merit)
                if merit > best:
                    best, chosen = merit, (forward, backward)
        if chosen is None:
            return math.inf, None
        forward, backward = chosen
        number = instance.number
        one = number(forward, self.forwards[forward], F)
        return -best[0], instance.overlap(one, number(backward, self.backwards[backward], B))

    def _best_forward(self, now: float, forwards: list[tuple[float, float, int]]) -> int | None:
        for _, arrival, lane in sorted(forwards, reverse=True):
            shallow = self.live + self.instance.live[lane] <= self.depth
            if arrival <= now and (shallow or self._is_eldest(lane, self.forwards[lane])):
                return lane
        return None

    def _filler(self, now: float, until: float) -> int | None:
        """A W to do until something better starts, if there is time for it."""
        if not self.owed:
            return None
        end = now + self.instance.time[self.owed[0]]
        return self.owed[0] if end <= until + self.policy.weight_delay else None

    def _eldest(self) -> tuple[int, int]:
        """(microbatch, direction) of the eldest that is not through with this rank."""
        stages = self.instance.num_stages
        return min((self.backwards[lane], lane // stages) for lane in self.lanes)

    def _is_eldest(self, lane: int, micro: int) -> bool:
        return (micro, lane // self.instance.num_stages) == self._eldest()

    def _fits(self, lane: int, micro: int) -> bool:
        """Whether a forward leaves room, for itself now and for the eldest until it ends."""
        if self.cap == math.inf:
            return True
        instance = self.instance
        size = instance.live[lane]
        if self.live + size > self.cap:
            return False
        eldest, direction = self._eldest()
        if (micro, lane // instance.num_stages) == (eldest, direction):
            return True
        others, whole = self.live - self.owed_memory + size, 0.0
        for each in self.lanes:
            if each // instance.num_stages == direction:
                whole += instance.live[each]
                if self.backwards[each] <= eldest < self.forwards[each]:
                    others -= instance.live[each]
        return others + whole <= self.cap

    def run(self, now: float, entry: int) -> list[tuple[int, float]]:
        """Do an entry; the products that it makes and when they arrive."""
        instance, made = self.instance, []
        self.row.append(entry)
        self.free_at = now + instance.time_of(entry, self.comm_free_at - now)
        for action in instance.parts(entry):
            self._account(action)
            arrival = self.free_at
            if instance.sent[action]:
                arrival = self.comm_free_at = max(self.comm_free_at, arrival) + instance.costs.transfer
            made.append((instance.makes[action], arrival))
        return made

    def _account(self, action: int) -> None:
        lane, kind = action // 4 // self.instance.micros, action % 4
        size = self.instance.live[lane]
        if kind == F:
            self.forwards[lane] += 1
            self.live += size
        elif kind == W:
            self.owed.popleft()
            self.owed_memory -= size
            self.live -= size
        else:
            self.backwards[lane] += 1
            if kind == I:
                self.owed.append(action - I + W)
                self.owed_memory += size
            else:
                self.live -= size
