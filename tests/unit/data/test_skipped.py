"""Skipped data moves later positions, by arithmetic alone."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from moe_runtime.data.skipped import SkippedData

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=6)


@given(RANGES, st.integers(0, 40), st.integers(0, 30))
def test_positions_are_the_numbers_outside_all_ranges_in_order(
    ranges: list[tuple[int, int]], first: int, count: int
) -> None:
    outside = [n for n in range(300) if not any(start <= n < start + length for start, length in ranges)]
    assert SkippedData(ranges).numbers(first, count).tolist() == outside[first : first + count]


@given(RANGES)
def test_ranges_that_touch_are_one(ranges: list[tuple[int, int]]) -> None:
    merged = SkippedData(ranges).ranges
    assert all(a + length < b for (a, length), (b, _) in pairwise(merged))


@given(RANGES, RANGES, st.integers(0, 50))
def test_ranges_that_come_late_leave_the_past_as_it_was(
    saved: list[tuple[int, int]], wanted: list[tuple[int, int]], position: int
) -> None:
    before, after = SkippedData(saved), SkippedData(saved).with_later(wanted, position)
    assert after.numbers(0, position).tolist() == before.numbers(0, position).tolist()
    reached = before.number(position)
    for start, length in wanted:
        ahead = set(range(max(start, reached), start + length))
        assert not ahead & set(after.numbers(position, 200).tolist())
