"""Programs of forwards alone, which `check` cannot judge as a whole, meet its partial proofs."""

import pytest

from moe_runtime import schedule
from moe_runtime.schedule import Action, Kind
from moe_runtime.schedule.forward_only import forward_only
from moe_runtime.schedule.matching import check_matching
from moe_runtime.schedule.order import walk_row
from moe_runtime.schedule.progress import check_progress

PLACEMENTS = {
    "single": ((0,),),
    "1f1b": ((0, 1, 2, 3, 4),),
    "dualpipe of 2": ((0, 1), (1, 0)),
    "dualpipe of 8": (tuple(range(8)), tuple(range(8))[::-1]),
    "v": ((0, 1, 2, 2, 1, 0),),
}


@pytest.mark.parametrize("placement", PLACEMENTS.values(), ids=PLACEMENTS.keys())
@pytest.mark.parametrize("per_direction", [1, 2, 5, 11])
def test_forward_only_programs_are_complete_ordered_matched_and_free_of_deadlock(
    placement: tuple[tuple[int, ...], ...], per_direction: int
) -> None:
    program = forward_only(placement, per_direction * len(placement))
    for rank, row in enumerate(program.rows):
        walk_row(program, rank, lowered=True)
        forwards = [entry for entry in row if isinstance(entry, Action) and not entry.kind.is_transfer]
        wanted = {
            Action(Kind.FORWARD, stage, microbatch, direction)
            for direction, stage in program.stages_of(rank)
            for microbatch in range(per_direction)
        }
        assert len(forwards) == len(wanted) and set(forwards) == wanted
    check_progress(program, check_matching(program))


def test_forward_only_programs_survive_the_round_trip() -> None:
    program = forward_only(((0, 1), (1, 0)), 6)
    assert schedule.Program.from_text(program.to_text()) == program
