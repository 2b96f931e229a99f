"""Programs of lanes are compared by what they exchange, and by nothing else."""

from dataclasses import replace

import pytest

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Program


def test_collectives_leave_out_weight_gradients_and_transfers() -> None:
    program = schedule.lower(schedule.build("dualpipe", 2, 4))
    assert " ".join(schedule.collectives_of(program, 0)) == (
        " ".join(
            str(entry).replace("I", "B")
            for entry in schedule.build("dualpipe", 2, 4).rows[0]
            if "W" not in str(entry)
        )
    )


@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipe", "dualpipev"])
def test_lanes_may_differ_in_deferral_and_in_transfers(name: str) -> None:
    program = schedule.build(name, 4, 8)
    lanes = [
        program,
        schedule.lower(program, 0),
        schedule.lower(program, 3),
        schedule.merge_weight_grads(program),
    ]
    schedule.check_lanes([*lanes, schedule.split_backward(program)])


def swapped(program: Program, rank: int, first: int) -> Program:
    row = list(program.rows[rank])
    row[first], row[first + 1] = row[first + 1], row[first]
    return replace(program, rows=(*program.rows[:rank], tuple(row), *program.rows[rank + 1 :]))


def test_a_lane_that_exchanges_in_another_order_is_named() -> None:
    program = schedule.build("gpipe", 2, 3)
    other = swapped(program, 1, 1)
    other.check()  # right by itself: only together the two would hang
    with pytest.raises(ScheduleError) as caught:
        schedule.check_lanes([program, program, other])
    assert str(caught.value) == (
        "lane 2: rank 1, entry 1 (1F2) meets rank 1, entry 1 (1F1) of lane 0; "
        "lanes must exchange in one order"
    )


def test_a_lane_that_exchanges_less_or_has_other_ranks_is_named() -> None:
    program, shorter = schedule.build("1f1b", 2, 3), schedule.build("1f1b", 2, 2)
    with pytest.raises(
        ScheduleError, match=r"^lane 1: rank 0, entry 3 \(0B1\) meets rank 0, entry 3 \(0F2\) of"
    ):
        schedule.check_lanes([program, shorter])
    single = schedule.build("single", 1, 3), schedule.build("single", 1, 2)
    with pytest.raises(ScheduleError, match=r"^lane 1: nothing more meets rank 0, entry 4 \(0F2\) of lane 0"):
        schedule.check_lanes(single)
    with pytest.raises(ScheduleError, match="lane 1 has 1 pipeline ranks; expected 2, as lane 0"):
        schedule.check_lanes([program, single[0]])
