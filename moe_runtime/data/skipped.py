"""Data that training passes over: a map from position to sequence number, by arithmetic alone.

Sequences are numbered from the start of training (`loader.py`). Training itself counts positions: the
sequences that it has used. Without skipped data both are the same; a skipped range moves every later
position up by its length. So what a run reads at any step follows from its step number and the list of
ranges, on every rank and after every restart, and a run that is given from the start the ranges that
another one came to by a roll-back reads the same sequences.

A range is only ever added ahead of where a run stands. One that began earlier would move what has
been read already: the run would pass over other sequences than were meant.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from moe_runtime.data.vocabulary import Ids

Range = tuple[int, int]  # first sequence number, how many


class SkippedData:
    """Sorted, disjoint ranges of sequence numbers that are never read.

    Args:
        ranges: (first, count), in any order; those that touch or overlap become one.
    """

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        self.ranges: tuple[Range, ...] = _merged(ranges)

    def numbers(self, first: int, count: int) -> Ids:
        """Sequence numbers at the positions first .. first + count - 1, int64 [count]."""
        numbers = np.arange(first, first + count, dtype=np.int64)
        for start, length in self.ranges:  # ascending: each sees what the ranges before have moved
            numbers[numbers >= start] += length
        return numbers

    def number(self, position: int) -> int:
        """Sequence number at one position."""
        return int(self.numbers(position, 1)[0])

    def with_range(self, first: int, count: int) -> "SkippedData":
        """These and the sequences first .. first + count - 1."""
        return SkippedData([*self.ranges, (first, count)])

    def with_later(self, ranges: Iterable[Sequence[int]], position: int) -> "SkippedData":
        """These, and of other ranges what lies at or after the sequence at `position`."""
        reached = self.number(position)
        ahead = [(max(first, reached), first + count) for first, count in ranges]
        later = [(first, end - first) for first, end in ahead if end > first]
        return SkippedData([*self.ranges, *later])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SkippedData) and self.ranges == other.ranges

    def __hash__(self) -> int:
        return hash(self.ranges)


def _merged(ranges: Iterable[Sequence[int]]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for first, count in sorted((int(first), int(count)) for first, count in ranges):
        if merged and first <= sum(merged[-1]):
            start, length = merged[-1]
            merged[-1] = (start, max(length, first + count - start))
        elif count:
            merged.append((first, count))
    return tuple(merged)
