"""The bubble that a schedule cannot avoid, against closed forms."""

import pytest

from moe_runtime.parallel.clock import Clock, kind_of
from moe_runtime.schedule import build
from moe_runtime.schedule.action import Kind, Program, actions_of
from moe_runtime.train.meters.ideal_bubble import IdealBubble
from moe_runtime.train.meters.one_sum import OneSum

COSTS = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.INPUT_GRAD: 1.0, Kind.WEIGHT_GRAD: 1.0}
STEP_S = 100.0


def ran(program: Program, slow_stage: int | None = None) -> Clock:
    """A clock that saw all entries of all ranks; a slow stage takes twice as long."""
    clock = Clock()
    for row in program.rows:
        for entry in row:
            parts = [COSTS[a.kind] * (2 if a.stage == slow_stage else 1) for a in actions_of(entry)]
            seconds, times = clock.entries.get(kind_of(entry), (0.0, 0))
            clock.entries[kind_of(entry)] = seconds + sum(parts), times + 1
    return clock


def fraction(meter: IdealBubble, program: Program, clock: Clock, step: int) -> float | None:
    tables = OneSum(meter.shapes(program, step))
    meter.fill(tables, clock)
    meter.read(tables, STEP_S)
    return meter.fraction


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 5)])
def test_1f1b_waits_for_its_warm_up_and_its_cool_down(ranks: int, microbatches: int) -> None:
    program = build("1f1b", ranks, microbatches)
    # Rank r begins r forwards late, and in the end waits for the r-th of the ranks below it to come back.
    idle = [(ranks - 1 - r) * 3.0 + r * 1.0 for r in range(ranks)]
    found = fraction(IdealBubble(100), program, ran(program), 1)
    assert found == pytest.approx(sum(idle) / ranks / STEP_S)


def test_a_slow_stage_makes_the_others_wait() -> None:
    program = build("1f1b", 4, 8)
    even, uneven = (fraction(IdealBubble(100), program, ran(program, slow), 1) for slow in (None, 3))
    assert even is not None and uneven is not None and uneven > 2 * even


def test_dualpipe_waits_less_than_1f1b() -> None:
    found = [
        fraction(IdealBubble(100), program, ran(program), 1)
        for program in (build("dualpipe", 4, 8), build("1f1b", 4, 8))
    ]
    assert found[0] is not None and found[1] is not None and 0 < found[0] < found[1]


def test_it_is_computed_in_the_first_two_steps_of_a_program_and_then_now_and_again() -> None:
    first, second, meter = build("1f1b", 2, 4), build("1f1b", 2, 6), IdealBubble(10)
    programs = [first] * 7 + [second] * 5
    due = [step for step, program in enumerate(programs, 1) if meter.shapes(program, step)]
    assert due == [1, 2, 8, 9, 10]
