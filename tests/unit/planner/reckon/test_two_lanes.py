"""Computation beside exchanges on two lanes, in numbers that can be added up by hand."""

import pytest

from moe_runtime.planner.reckon.two_lanes import TimedStep, fly
from moe_runtime.schedule.interleave import interleave


def step(label: str, time: float, slowed: float | None = None) -> TimedStep:
    label_of_pass = label.removesuffix("_b")
    is_exchange = label_of_pass in ("dispatch", "combine")
    return TimedStep(label, "moe.0", time, time if slowed is None else slowed, is_exchange)


def test_what_an_exchange_brings_is_waited_for() -> None:
    flown = fly([step("attend", 4), step("dispatch", 3), step("experts", 5), step("combine", 2)], held=False)
    assert (flown.span, flown.computing, flown.flying) == (14, 9, 5)


def test_computation_between_an_exchange_and_its_reader_hides_it_and_is_slowed() -> None:
    row = [step("attend", 4, 8), step("dispatch", 3), step("shared", 2, 2.5), step("experts", 5, 9)]
    assert fly(row, held=False).span == 4 + 3 + 5
    longer = [step("attend", 4, 8), step("dispatch", 3), step("shared", 4, 5), step("experts", 5, 9)]
    assert fly(longer, held=False).span == 4 + 5 + 5


def test_exchanges_queue_on_their_lane() -> None:
    row = [step("dispatch", 3), step("combine_b", 4), step("experts", 1), step("experts_b", 1)]
    assert fly(row, held=False).span == 3 + 4 + 1  # experts run at 3, those of the backward at 7


def test_a_pair_hides_all_that_fits_and_all_its_computation_is_slowed() -> None:
    forward = [step("attend", 4, 5), step("dispatch", 2), step("experts", 4, 5), step("combine", 3)]
    backward = [step("combine_b", 2), step("experts_b", 4, 5), step("dispatch_b", 3), step("attend_b", 6, 7)]
    flown = fly(interleave(forward, backward), held=True)
    assert flown.computing == 5 + 5 + 5 + 7
    assert flown.span == flown.computing


@pytest.mark.parametrize("exchange", [20.0, 30.0])
def test_a_pair_bound_by_exchanges_takes_as_long_as_they_do(exchange: float) -> None:
    forward = [step("attend", 4), step("dispatch", exchange), step("experts", 4), step("combine", exchange)]
    backward = [
        step("combine_b", exchange), step("experts_b", 4), step("dispatch_b", exchange), step("attend_b", 6)
    ]  # fmt: skip
    flown = fly(interleave(forward, backward), held=False)
    assert flown.flying == 4 * exchange
    assert flown.flying <= flown.span <= flown.flying + 4 + 4
