"""A program in counts: what a search needs to know of thousands of programs without simulating each.

What a layout costs in time and memory is mostly a matter of how many entries of each kind a rank runs and
how many microbatches it holds. Neither depends on what an entry costs, so a program is read once, and then
priced for every expert-parallel size, recompute and machine by a few multiplications.

    before | during | after     a rank's entries, cut at its first and after its last backward for inputs

`lower_bound` says what no simulation of the program can undercut: a rank starts when a microbatch has come
to it, starts its first backward when a gradient has come to it, and the step ends no sooner than its last
gradient has gone home.

    head = forwards until this rank          turn = all forwards, and backwards down to this rank
    end >= max(head + before, turn) + during + max(after, backwards from this rank to the first stage)

Every term counts an entry's least time, so the bound holds for any costs and is reached by schedules that
never wait in between, such as 1F1B. Waits in between, and messages that hold up a lane, only add to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import le, mul

from moe_runtime.planner.costs import Costs
from moe_runtime.planner.reckon.kept import Live
from moe_runtime.planner.reckon.live import boundary_tensors, rise
from moe_runtime.schedule.action import Action, Entry, Kind, Overlap, Program, actions_of, is_transfer

_BACK = (Kind.BACKWARD, Kind.INPUT_GRAD)
Counts = tuple[tuple[Entry, int], ...]
Counted = tuple[int, ...]
Pair = tuple[int, int]
Moment = tuple[Counted, Pair | None]


@dataclass(frozen=True, slots=True)
class RowDigest:
    """One rank's row.

    Args:
        before, during, after: how often each kind of entry runs, microbatch numbers left out.
        first: stage of the first forward; turn, last: of the first and of the last backward for inputs.
        stages: that the rank holds, in order.
        peaks: microbatches alive in each of `stages`, then those that wait for W in each, and the stages of
            the forward and the backward of an overlap that runs then; at every moment that no other exceeds.
        boundary: most tensors between stages at a time, as `live.py` counts them.
    """

    before: Counts
    during: Counts
    after: Counts
    first: int
    turn: int
    last: int
    stages: tuple[int, ...]
    peaks: tuple[Moment, ...]
    boundary: int

    @property
    def overlaps(self) -> bool:
        """Some forwards and backwards run interleaved."""
        return any(isinstance(entry, Overlap) for entry, _ in self.during)

    def fullest(self, stages: Sequence[Live]) -> float:
        """Most bytes of activations at once, given those of one microbatch in each stage of the program."""
        sizes = [stages[stage].whole for stage in self.stages] + [stages[stage].owed for stage in self.stages]
        pairs = {pair for _, pair in self.peaks if pair is not None}
        rises = {(one, other): rise(stages[one].parts, stages[other].parts) for one, other in pairs}
        return max(
            sum(map(mul, counted, sizes)) + (rises[pair] if pair else 0.0) for counted, pair in self.peaks
        )


@dataclass(frozen=True, slots=True)
class Digest:
    """A program in counts.

    Args:
        sent: of each stage's output, whether another rank reads it (in any direction).
        sample: the program with every kind of entry of a row once, for whoever asks what it consists of.
    """

    rows: tuple[RowDigest, ...]
    num_stages: int
    sent: tuple[bool, ...]
    sample: Program

    def lower_bound(self, costs: Costs) -> float:
        """The least time that a simulation with these costs could give."""
        forward, backward = self._least(costs)
        hops = [costs.transfer * sent for sent in self.sent]
        whole = sum(forward) + sum(hops[:-1])
        heads, homes, downs = [0.0], [0.0], [0.0]
        for stage in range(self.num_stages - 1):
            heads.append(heads[-1] + forward[stage] + hops[stage])
            homes.append(homes[-1] + backward[stage] + hops[stage])
        for stage in range(self.num_stages - 1, 0, -1):
            downs.append(downs[-1] + backward[stage] + hops[stage - 1])
        downs.reverse()
        ends = (self._end(row, costs, heads, homes, downs, whole) for row in self.rows)
        return max(ends) * (1 - 1e-9)

    def _end(
        self,
        row: RowDigest,
        costs: Costs,
        heads: list[float],
        homes: list[float],
        downs: list[float],
        whole: float,
    ) -> float:
        before, during, after = (_time(part, costs) for part in (row.before, row.during, row.after))
        turned = max(heads[row.first] + before, whole + downs[row.turn])
        return turned + during + max(after, homes[row.last])

    def _least(self, costs: Costs) -> tuple[list[float], list[float]]:
        """The least times of a forward and of a backward for inputs in each stage, alone or in a pair."""
        forward, backward = [float("inf")] * self.num_stages, [float("inf")] * self.num_stages
        for entry in {entry for row in self.sample.rows for entry in row}:
            time = costs.duration(entry)
            for action in actions_of(entry):
                if action.kind is Kind.FORWARD:
                    forward[action.stage] = min(forward[action.stage], time)
                elif action.kind in _BACK:
                    backward[action.stage] = min(backward[action.stage], time)
        return forward, backward


def digest(program: Program) -> Digest:
    """Read a program once; transfers in it are passed over."""
    rows = [[entry for entry in row if not is_transfer(entry)] for row in program.rows]
    digests = tuple(_row(row, program, rank) for rank, row in enumerate(rows))
    sample = tuple(
        tuple(dict.fromkeys(entry for part in (row.before, row.during, row.after) for entry, _ in part))
        for row in digests
    )
    sent = [
        all(way[stage] != way[stage + 1] for way in program.placement)
        for stage in range(program.num_stages - 1)
    ]
    return Digest(digests, program.num_stages, (*sent, False), replace(program, rows=sample))


def _row(row: list[Entry], program: Program, rank: int) -> RowDigest:
    acts = [actions_of(entry) for entry in row]
    back = [place for place, actions in enumerate(acts) if any(one.kind in _BACK for one in actions)]
    first, last = back[0], back[-1]
    stages = tuple(sorted({stage for _, stage in program.stages_of(rank)}))
    return RowDigest(
        before=_count(row[:first]),
        during=_count(row[first : last + 1]),
        after=_count(row[last + 1 :]),
        first=next(one.stage for actions in acts for one in actions if one.kind is Kind.FORWARD),
        turn=_backward_stage(acts[first]),
        last=_backward_stage(acts[last]),
        stages=stages,
        peaks=_peaks(row, stages),
        boundary=sum(boundary_tensors(program, row)),
    )


def _backward_stage(actions: tuple[Action, ...]) -> int:
    return next(one.stage for one in actions if one.kind in _BACK)


def _count(entries: list[Entry]) -> Counts:
    counted: dict[tuple[Kind | int, int], list] = {}
    for entry in entries:
        if isinstance(entry, Overlap):
            key: tuple[Kind | int, int] = (entry.forward.stage, entry.backward.stage)
        else:
            key = (entry.kind, entry.stage)
        found = counted.get(key)
        if found is None:
            counted[key] = [_plain(entry), 1]
        else:
            found[1] += 1
    return tuple((entry, count) for entry, count in counted.values())


def _plain(entry: Entry) -> Entry:
    """The entry as that of microbatch 0: what costs ask about is its kind and stage."""
    if isinstance(entry, Overlap):
        return Overlap(entry.forward._replace(microbatch=0), entry.backward._replace(microbatch=0))
    return entry._replace(microbatch=0)


def _peaks(row: list[Entry], stages: tuple[int, ...]) -> tuple[Moment, ...]:
    """Counts of microbatches that no other moment of the same kind reaches in every place."""
    place = {stage: number for number, stage in enumerate(stages)}
    size = len(stages)
    now, moments = [0] * (2 * size), set[Moment]()
    for entry in row:
        if isinstance(entry, Overlap):
            moments.add((tuple(now), (entry.forward.stage, entry.backward.stage)))
        for one in actions_of(entry):
            at = place[one.stage]
            now[at] += (one.kind is Kind.FORWARD) - (one.kind in _BACK)
            now[size + at] += (one.kind is Kind.INPUT_GRAD) - (one.kind is Kind.WEIGHT_GRAD)
        moments.add((tuple(now), None))
    found: list[Moment] = []
    for moment in sorted(moments, key=lambda each: sum(each[0]), reverse=True):
        if not any(moment[1] == other[1] and all(map(le, moment[0], other[0])) for other in found):
            found.append(moment)
    return tuple(found)


def _time(counts: Counts, costs: Costs) -> float:
    return sum(count * costs.duration(entry) for entry, count in counts)
