"""A scheduling problem in whole numbers: what a search walks through thousands of times.

The search asks the simulator's question again and again, where hashing actions and products would be
most of the time. So here every computation of a step has a number, tables give its time, need and
product, and a row is a list of numbers. A lane is a (direction, stage) pair, with m microbatches:

    action    4 * (lane * m + microbatch) + kind, kind being F, I, W or B below
    overlap   N + N * (number of the F) + number of the B, N being the count of numbers for actions
    product   lane * m + microbatch for an activation, and as much again later for a gradient

`Instance.evaluate` is `simulate` in this form; a test holds the two together.
"""

import math

from moe_runtime.planner.costs import Costs
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program

F, I, W, B = range(4)  # noqa: E741
_KINDS = (Kind.FORWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD, Kind.BACKWARD)
Rows = list[list[int]]
Placement = tuple[tuple[int, ...], ...]


class Instance:
    """A placement with its costs and microbatches.

    Args:
        placement: `placement[direction][stage]` is the pipeline rank.
        num_microbatches: over all directions, a multiple of their number.
        costs: of every stage.
    """

    def __init__(self, placement: Placement, num_microbatches: int, costs: Costs) -> None:
        self.placement, self.num_microbatches, self.costs = placement, num_microbatches, costs
        self.num_stages = len(placement[0])
        self.num_ranks = 1 + max(max(holders) for holders in placement)
        self.micros = num_microbatches // len(placement)
        self.rank_of = [rank for holders in placement for rank in holders]
        self.num_lanes = len(self.rank_of)
        self.lanes_of = [
            [lane for lane in range(self.num_lanes) if self.rank_of[lane] == rank]
            for rank in range(self.num_ranks)
        ]
        self.live = [costs.stages[lane % self.num_stages].live for lane in range(self.num_lanes)]
        self.num_actions = 4 * self.num_lanes * self.micros
        self._tabulate_actions()
        self._tabulate_overlaps()

    def number(self, lane: int, micro: int, kind: int) -> int:
        """The number of an action."""
        return 4 * (lane * self.micros + micro) + kind

    def overlap(self, forward: int, backward: int) -> int:
        """The number of an overlap of two numbered actions."""
        return self.num_actions * (1 + forward) + backward

    def parts(self, entry: int) -> tuple[int, ...]:
        """The actions of an entry, both of an overlap."""
        return (entry,) if entry < self.num_actions else divmod(entry - self.num_actions, self.num_actions)

    def entry(self, number: int) -> Entry:
        """An entry of a program, from its number."""
        actions = []
        for part in self.parts(number):
            lane, micro = divmod(part // 4, self.micros)
            direction, stage = divmod(lane, self.num_stages)
            actions.append(Action(_KINDS[part % 4], stage, micro, direction))
        return actions[0] if len(actions) == 1 else Overlap(*actions)

    def program(self, rows: Rows, name: str = "searched") -> Program:
        """The program that `rows` stand for."""
        entries = tuple(tuple(map(self.entry, row)) for row in rows)
        return Program(name, entries, self.placement, self.num_microbatches)

    def rows(self, program: Program) -> Rows:
        """A program without transfers in numbers."""
        return [[self._number_of(entry) for entry in row] for row in program.rows]

    def _number_of(self, entry: Entry) -> int:
        if isinstance(entry, Overlap):
            return self.overlap(self._number_of(entry.forward), self._number_of(entry.backward))
        lane = entry.direction * self.num_stages + entry.stage
        return self.number(lane, entry.microbatch, _KINDS.index(entry.kind))

    def _tabulate_actions(self) -> None:
        """Time, exchange, need, product and whether it is sent, of every action."""
        gradients = self.num_lanes * self.micros  # the number of the first gradient
        self.at_start, self.for_none = 2 * gradients, 2 * gradients + 1
        self.user = [-1] * (self.for_none + 1)  # the rank that needs a product
        self.time: list[float] = []
        self.exchange: list[float] = []
        self.need: list[int] = []
        self.makes: list[int] = []
        self.sent: list[bool] = []
        for lane in range(self.num_lanes):
            is_first, is_last = lane % self.num_stages == 0, (lane + 1) % self.num_stages == 0
            for micro in range(self.micros):
                own = lane * self.micros + micro
                forward = self.at_start if is_first else own - self.micros
                backward = own if is_last else gradients + own + self.micros
                self.need += [forward, backward, self.at_start, backward]
                self.makes += [own, gradients + own, self.for_none, gradients + own]
                self.user[own] = self.rank_of[lane] if is_last else self.rank_of[lane + 1]
                self.user[gradients + own] = -1 if is_first else self.rank_of[lane - 1]
                up = not is_last and self.rank_of[lane + 1] != self.rank_of[lane]
                down = not is_first and self.rank_of[lane - 1] != self.rank_of[lane]
                self.sent += [up, down, False, down]
                actions = [Action(kind, lane % self.num_stages, micro) for kind in _KINDS]
                self.time += map(self.costs.duration, actions)
                self.exchange += map(self.costs.comm, actions)

    def _tabulate_overlaps(self) -> None:
        """Time and exchange of every pair of lanes."""
        stages = range(self.num_stages)
        pairs = [
            [Overlap(Action(Kind.FORWARD, f, 0), Action(Kind.BACKWARD, b, 1)) for b in stages] for f in stages
        ]
        directions = len(self.placement)
        self.pair_time = [[*map(self.costs.duration, row)] * directions for row in pairs] * directions
        self.gain = [
            [
                self.time[self.number(f, 0, F)] + self.time[self.number(b, 0, B)] - time
                for b, time in enumerate(row)
            ]
            for f, row in enumerate(self.pair_time)
        ]
        self.pair_exchange = [[*map(self.costs.comm, row)] * directions for row in pairs] * directions

    def evaluate(self, rows: Rows) -> float:
        """The makespan of rows; infinite if they wait for ever."""
        return self.clock(rows)[0]

    def clock(self, rows: Rows) -> tuple[float, list[list[float]], list[list[float]]]:
        """The makespan of rows, and each entry's start and end; the makespan is infinite in a deadlock."""
        starts: list[list[float]] = [[] for _ in rows]
        ends: list[list[float]] = [[] for _ in rows]
        arrivals = [-1.0] * (self.for_none + 1)
        arrivals[self.at_start] = 0.0
        comm_free = [0.0] * len(rows)
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(rows):
                if len(ends[rank]) < len(row):
                    moved |= self._advance(row, rank, starts[rank], ends[rank], arrivals, comm_free)
        if any(len(done) < len(row) for done, row in zip(ends, rows, strict=True)):
            return math.inf, starts, ends
        return max(done[-1] for done in ends if done), starts, ends

    def _advance(
        self,
        row: list[int],
        rank: int,
        starts: list[float],
        ends: list[float],
        arrivals: list[float],
        comm_free: list[float],
    ) -> bool:
        """Run one rank until it ends or waits; see `simulate` for the rules."""
        need, makes, sent, size, transfer = (
            self.need,
            self.makes,
            self.sent,
            self.num_actions,
            self.costs.transfer,
        )
        position = before = len(ends)
        now = ends[-1] if ends else 0.0
        while position < len(row):
            entry = row[position]
            if entry < size:
                arrived = arrivals[need[entry]]
                time, backward = self.time[entry], -1
            else:
                entry, backward = divmod(entry - size, size)
                arrived, other = arrivals[need[entry]], arrivals[need[backward]]
                arrived = max(arrived, other) if other >= 0 and arrived >= 0 else -1.0
                time = self.pair_time[entry // 4 // self.micros][backward // 4 // self.micros]
            if arrived < 0:
                break
            start = now if now > arrived else arrived
            if transfer and comm_free[rank] > start:
                time = self.time_of(row[position], comm_free[rank] - start)
            now = start + time
            starts.append(start)
            ends.append(now)
            for part in (entry, backward) if backward >= 0 else (entry,):
                if transfer and sent[part]:
                    comm_free[rank] = max(comm_free[rank], now) + transfer
                    arrivals[makes[part]] = comm_free[rank]
                else:
                    arrivals[makes[part]] = now
            position += 1
        return position > before

    def time_of(self, entry: int, backlog: float = 0.0) -> float:
        """What an entry takes when that much of the messages before it is still leaving."""
        if entry < self.num_actions:
            time, exchange = self.time[entry], self.exchange[entry]
        else:
            forward, backward = (part // 4 // self.micros for part in self.parts(entry))
            time, exchange = self.pair_time[forward][backward], self.pair_exchange[forward][backward]
        held_up = max(0.0, backlog - max(0.0, time - exchange)) if exchange > 0 else 0.0
        return time + held_up
