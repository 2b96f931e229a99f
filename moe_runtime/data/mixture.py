"""Which prepared set each sequence of a mixture is of, by arithmetic on its number alone.

Weights become whole quotas: of every `period` sequences in a row, set k has quota k of them, exactly. Where
the weights are simple (7, 2 and 1, or 0.7, 0.2 and 0.1) the period is their smallest common one; otherwise it
is 2^16 and quotas are rounded by largest remainder. Within a period the sets take turns so that every prefix
has its shares to less than one sequence a set: the assignment of chairmen to states (R. Tijdeman, "The
chairman assignment problem", 1980). So every global batch has the shares too, and no random draw makes a
step of one set alone. The turn of a sequence is an entry of a table of one period; its number within its set
is quota times the periods before, plus its rank in the table.

Rejected: drawing the set of each sequence at random from (seed, number). Which sequence of its set comes next
would need a count over all draws before, so nothing could be found from a number, and shares of a batch would
scatter.

A run may change its weights, or its sets, where it resumes. Numbers from there on follow the new quotas, and
each set goes on where it stood: a `Segment` keeps how many sequences of each set came before it. The list of
segments lies in the checkpoint: a position is still found from its number, and every layout finds the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe_runtime.data.vocabulary import Ids
from moe_runtime.errors import DataError

LONGEST_PERIOD = 2**16


def quotas_of(weights: Mapping[str, float]) -> dict[str, int]:
    """Sequences of each set in a period; sets of weight 0 are left out.

    Raises:
        DataError: a weight so small that its set would never be read.
    """
    exact = {name: Fraction(repr(weight)) for name, weight in weights.items() if weight > 0}
    total = sum(exact.values())
    shares = {name: weight / total for name, weight in exact.items()}
    period = lcm(*(share.denominator for share in shares.values()))
    if period <= LONGEST_PERIOD:
        return {name: int(share * period) for name, share in shares.items()}
    ideal = {name: share * LONGEST_PERIOD for name, share in shares.items()}
    quotas = {name: int(wanted) for name, wanted in ideal.items()}
    by_remainder = sorted(ideal, key=lambda name: quotas[name] - ideal[name])
    for name in by_remainder[: LONGEST_PERIOD - sum(quotas.values())]:
        quotas[name] += 1
    for name, quota in quotas.items():
        if quota == 0:
            raise DataError(
                f"data.mixture.{name}.weight: expected at least 1/{LONGEST_PERIOD} of the sum of all "
                f"weights, got {weights[name]:g} of {float(total):g}; raise it, or set 0 to only validate"
            )
    return quotas


@cache
def turns(quotas: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Whose turn each place of a period is, and how many turns that set had before: int64 [period] each.

    Among the sets that are far enough behind, the one whose turn must come soonest.
    """
    period, sets = sum(quotas), len(quotas)
    whose, ranks = np.zeros(period, dtype=np.int64), np.zeros(period, dtype=np.int64)
    if sets == 1:
        ranks += np.arange(period)
        return whose, ranks
    had, spread = [0] * sets, 2 * sets - 2  # sets are two or more from here on
    for place in range(period):
        # How far each set is behind after this place, in units of 1 / period.
        behind = [(place + 1) * quota - count * period for quota, count in zip(quotas, had, strict=True)]
        ready = [k for k in range(sets) if behind[k] * spread >= period]
        # Exact enough: quotients of whole numbers below 2^53 that differ, differ by far more than a rounding.
        chosen = min(ready, key=lambda k: (period * (spread - 1) - spread * behind[k]) / quotas[k])
        whose[place], ranks[place] = chosen, had[chosen]
        had[chosen] += 1
    return whose, ranks


@dataclass(frozen=True)
class Segment:
    """Sequence numbers from `first` on, under one list of quotas.

    Args:
        first: number of its first sequence.
        quotas: sequences of each set in a period.
        before: sequences that each set gave before this segment.
    """

    first: int
    quotas: Mapping[str, int]
    before: Mapping[str, int]

    def locate(self, numbers: Ids) -> tuple[NDArray[np.int64], Ids]:
        """Of each sequence its set, as a place in `quotas`, and its number within that set."""
        sizes = np.array(list(self.quotas.values()), dtype=np.int64)
        starts = np.array([self.before.get(name, 0) for name in self.quotas], dtype=np.int64)
        periods, places = np.divmod(numbers - self.first, int(sizes.sum()))
        whose, ranks = turns(tuple(self.quotas.values()))
        sets = whose[places]
        return sets, np.add(starts[sets] + ranks[places], periods * sizes[sets], dtype=np.int64)

    def counts(self, number: int) -> dict[str, int]:
        """Sequences of each set before the sequence `number` of this segment, all earlier ones too."""
        periods, rest = divmod(number - self.first, sum(self.quotas.values()))
        begun = np.bincount(turns(tuple(self.quotas.values()))[0][:rest], minlength=len(self.quotas))
        own = {name: periods * quota + int(begun[k]) for k, (name, quota) in enumerate(self.quotas.items())}
        return {name: self.before.get(name, 0) + own.get(name, 0) for name in {**self.before, **own}}


class Mixture:
    """The segments of a run, in order; the last one is open.

    Args:
        quotas: those of the config.
        segments: earlier ones, of a checkpoint.
    """

    def __init__(self, quotas: Mapping[str, int], segments: Sequence[Segment] = ()) -> None:
        self.segments = tuple(segments) or (Segment(0, quotas, {}),)

    def locate(self, numbers: Ids) -> list[tuple[str, NDArray[np.int64], Ids]]:
        """Per set and segment: its name, which places of `numbers` it fills, and its own numbers there."""
        found = []
        last = np.searchsorted([one.first for one in self.segments], numbers, side="right") - 1
        for index, segment in enumerate(self.segments):
            inside = np.flatnonzero(last == index)
            if inside.size:
                sets, own = segment.locate(numbers[inside])
                for k, name in enumerate(segment.quotas):
                    chosen = sets == k
                    found.append((name, inside[chosen], own[chosen]))
        return [entry for entry in found if entry[1].size]

    def counts(self, number: int) -> dict[str, int]:
        """Sequences of each set before the sequence `number`."""
        segment = next(one for one in reversed(self.segments) if one.first <= number)
        return segment.counts(number)

    def to_json(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps."""
        return [
            {"first": one.first, "quotas": dict(one.quotas), "before": dict(one.before)}
            for one in self.segments
        ]


def resumed(
    quotas: Mapping[str, int], saved: Sequence[Mapping[str, Any]], number: int, stretch: Fraction
) -> Mixture:
    """The mixture of a run that goes on at sequence `number` of a checkpoint.

    Args:
        quotas: of the config.
        saved: segments of the checkpoint, from `to_json`; none if it had no mixture.
        number: first sequence that is not trained on yet.
        stretch: tokens of a sequence then over those of one now; not 1 where batch.seq_len changed.
    """
    segments = [Segment(one["first"], one["quotas"], one["before"]) for one in saved]
    kept = [one for one in segments if one.first < number or one.first == number == 0]
    if not kept:
        return Mixture(quotas, (Segment(number, quotas, {}),))
    if dict(kept[-1].quotas) == dict(quotas) and stretch == 1:
        return Mixture(quotas, kept)
    reached = int(number / stretch) if stretch != 1 else number
    counts = kept[-1].counts(max(reached, kept[-1].first))
    # A sequence that was begun counts as read: no token comes twice within an epoch.
    before = {name: -int(-count * stretch // 1) for name, count in counts.items()}
    return Mixture(quotas, (*(kept if stretch == 1 else ()), Segment(number, quotas, before)))
