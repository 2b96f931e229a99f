"""Deadlocks of transports with few buffers are found, and what builders make needs few."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Program, progress
from moe_runtime.schedule.matching import check_matching
from moe_runtime.schedule.progress import check_progress
from tests.unit.schedule.mailbox import Mailboxes

SIZES = [(name, ranks, 2 * ranks + more) for name in schedule.BUILDERS for ranks in (2, 4) for more in (0, 6)]
SIZES = [size for size in SIZES if schedule.admissible(*size) is None]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_one_buffer_a_pair_is_enough_with_receives_posted_one_computation_ahead(
    name: str, ranks: int, microbatches: int
) -> None:
    lowered = schedule.lower(schedule.build(name, ranks, microbatches))
    lowered.check(max_unmatched=1)
    if name in ("gpipe", "1f1b", "zb1p"):  # one direction of each pair never waits for the other
        lowered.check(max_unmatched=0)


# The first sends of both ranks meet no receive: each is posted behind the other rank's own send.
FACING = """facing microbatches=2 placement=0,1/1,0
    0: 0F0 0SA0 1RA0' 1F0' 1B0' 1SG0' 0RG0 0B0
    1: 0F0' 0SA0' 1RA0 1F0 1B0 1SG0 0RG0' 0B0'"""


def test_a_rendezvous_that_both_sides_open_by_sending_is_a_deadlock() -> None:
    program = Program.from_text(FACING)
    program.check()
    program.check(max_unmatched=1)
    with pytest.raises(ScheduleError) as caught:
        program.check(max_unmatched=0)
    assert str(caught.value) == (
        "schedule facing: deadlock: "
        "rank 0, entry 1 (0SA0) waits for the room that rank 1, entry 2 (1RA0) makes; "
        "rank 1, entry 1 (0SA0') waits for the room that rank 0, entry 2 (1RA0') makes"
    )


def test_a_negative_number_of_buffers_is_refused() -> None:
    with pytest.raises(ScheduleError, match="max_unmatched must be 0 or more, got -1"):
        schedule.build("1f1b", 2, 2).check(max_unmatched=-1)


def free_of_deadlock(program: Program, capacity: int | None) -> bool:
    try:
        program.check(capacity)
    except ScheduleError:
        return False
    return True


# A rendezvous completes with its own receive, which a mailbox of capacity 0 cannot tell from a full
# one; so the oracle starts at 1.
@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from(SIZES),
    prefetch=st.integers(0, 2),
    capacity=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_checker_and_mailbox_run_agree_on_few_buffers(
    size: tuple[str, int, int], prefetch: int, capacity: int, seed: int
) -> None:
    program = schedule.lower(schedule.build(*size), prefetch)
    assert free_of_deadlock(program, capacity) == Mailboxes(program, capacity).run(random.Random(seed))


# Along a tree the clocks are not merged; merging them must not tell more.
@settings(max_examples=40, deadline=None)
@given(size=st.sampled_from(SIZES), prefetch=st.integers(0, 3))
def test_clocks_need_no_merging_along_a_tree(size: tuple[str, int, int], prefetch: int) -> None:
    program = schedule.lower(schedule.build(*size), prefetch)
    channels = check_matching(program)
    found = check_progress(program, channels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "exchange_along_a_tree", lambda channels: False)
        assert check_progress(program, channels) == found


def test_only_the_interleaved_schedule_closes_a_ring() -> None:
    for name, ranks, microbatches in SIZES:
        channels = check_matching(schedule.lower(schedule.build(name, ranks, microbatches)))
        assert progress.exchange_along_a_tree(channels) == (name != "interleaved" or ranks == 2)
