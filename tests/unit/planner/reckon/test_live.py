"""The fullest moment of a row, on rows small enough to add up by hand."""

from moe_runtime.planner.reckon.kept import Live
from moe_runtime.planner.reckon.live import fullest
from moe_runtime.schedule.action import Action, Kind, Overlap, Program
from moe_runtime.schedule.builders import build
from moe_runtime.schedule.passes import lower

TWO = [Live(parts=(3.0, 2.0), owed=4.0), Live(parts=(10.0,), owed=1.0)]


def test_a_microbatch_counts_from_its_forward_to_its_backward() -> None:
    program = build("1f1b", 2, 4)
    first, last = (fullest(program, rank, TWO) for rank in (0, 1))
    assert (first.nbytes, first.microbatches) == (2 * 5.0, {0: 2})
    assert (last.nbytes, last.microbatches) == (10.0, {1: 1})


def test_what_waits_for_a_weight_gradient_counts_until_then() -> None:
    program = build("zb1p", 2, 4)
    heavy = [Live(parts=(1.0,), owed=100.0), Live(parts=(1.0,), owed=100.0)]
    found = fullest(program, 0, heavy)
    assert max(found.waiting.values()) == program.check().peak_pending_weight_grads[0]
    assert found.nbytes >= 100.0 * max(found.waiting.values())


def test_an_overlap_needs_one_block_more_and_not_both_microbatches() -> None:
    first, second = (Action(Kind.FORWARD, 0, number) for number in (0, 1))
    ends = [Action(Kind.BACKWARD, 0, number) for number in (0, 1)]
    program = Program("pair", ((first, Overlap(second, ends[0]), ends[1]),), ((0,),), 2)
    found = fullest(program, 0, [Live((1.0, 2.0, 3.0, 4.0), 0.0)])
    # The first block of 1 beside all of 10; then 10 + 1 - 4 + 2, and so on.
    assert (found.nbytes, found.between) == (11.0, 10.0)


def test_bytes_and_not_microbatches_make_the_fullest_moment() -> None:
    """Of a V's two stages on rank 0 the second is heavy: its few microbatches outweigh the first's many."""
    program = build("zbv", 2, 8)
    stages = [Live((1.0,), 0.0), Live((1.0,), 0.0), Live((1.0,), 0.0), Live((100.0,), 0.0)]
    found = fullest(program, 0, stages)
    assert found.nbytes >= 100.0 * found.microbatches[3] and found.microbatches[3] >= 1


def test_receives_are_counted_with_and_without_transfers() -> None:
    program = build("1f1b", 4, 8)
    for rank in range(4):
        bare, lowered = (fullest(form, rank, TWO * 2) for form in (program, lower(program)))
        assert lowered.received == lower(program).check().peak_posted_receives[rank]
        assert bare.received >= lowered.received
