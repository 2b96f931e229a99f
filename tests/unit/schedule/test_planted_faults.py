"""Every planted fault of every kind, in every builder's programs, is caught and named."""

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Program
from tests.unit.schedule.faults import FAULTS, Edit, Fault

BUILT = [
    schedule.build(*size)
    for size in (
        ("gpipe", 2, 3),
        ("1f1b", 3, 4),
        ("interleaved", 2, 4),
        ("interleaved", 3, 4),
        ("zb1p", 3, 5),
        ("zbv", 2, 4),
        ("zbv", 3, 2),
        ("dualpipe", 4, 8),
        ("dualpipev", 2, 5),
    )
]
PROGRAMS = [*BUILT, *map(schedule.lower, BUILT)]
names = pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)


@cache
def edits(fault: Fault, program_idx: int) -> list[Edit]:
    return list(fault(PROGRAMS[program_idx]))


def caught(edit: Edit) -> None:
    with pytest.raises(ScheduleError) as error:
        edit.program.check()
    message = str(error.value)
    assert all(name in message for name in edit.names), (message, edit.names)


@names
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_planted_fault_is_caught_and_named(fault: Fault, data: st.DataObject) -> None:
    choices = [idx for idx in range(len(PROGRAMS)) if edits(fault, idx)]
    program_idx = data.draw(st.sampled_from(choices))
    caught(data.draw(st.sampled_from(edits(fault, program_idx))))


@pytest.mark.slow
@names
def test_every_planted_fault_is_caught_and_named(fault: Fault) -> None:
    for program_idx in range(len(PROGRAMS)):
        for edit in edits(fault, program_idx):
            caught(edit)


def test_the_programs_that_faults_are_planted_in_are_right() -> None:
    assert {program.name for program in PROGRAMS} == set(schedule.BUILDERS) - {"single"}
    for program in PROGRAMS:
        program.check()


@names
def test_each_fault_can_be_planted_in_most_schedules(fault: Fault) -> None:
    def spoilt(program: Program) -> bool:
        return bool(edits(fault, PROGRAMS.index(program)))

    assert len({program.name for program in PROGRAMS if spoilt(program)}) >= 5
