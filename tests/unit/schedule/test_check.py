"""The checker finds every planted fault, passes what is right, and counts what is alive."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Action, Kind, Overlap, Program
from tests.unit.schedule.mailbox import Mailboxes

LOWERED = schedule.lower(schedule.build("dualpipe", 4, 8))


def with_row(program: Program, rank: int, row: list) -> Program:
    return replace(program, rows=(*program.rows[:rank], tuple(row), *program.rows[rank + 1 :]))


def swapped(program: Program, rank: int, first: str, second: str) -> Program:
    row = list(program.rows[rank])
    tokens = [str(entry) for entry in row]
    i, j = tokens.index(first), tokens.index(second)
    row[i], row[j] = row[j], row[i]
    return with_row(program, rank, row)


def passes(program: Program) -> bool:
    try:
        program.check()
    except ScheduleError:
        return False
    return True


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_no_entry_may_be_dropped(kind: Kind) -> None:
    dropped = 0
    for rank, row in enumerate(LOWERED.rows):
        for position, entry in enumerate(row):
            kinds = [entry.forward.kind, entry.backward.kind] if isinstance(entry, Overlap) else [entry.kind]
            if kind in kinds:
                assert not passes(with_row(LOWERED, rank, [*row[:position], *row[position + 1 :]])), str(
                    entry
                )
                dropped += 1
    assert dropped


@pytest.mark.parametrize("kind", list(Kind), ids=lambda kind: kind.name)
def test_no_entry_may_be_doubled(kind: Kind) -> None:
    doubled = 0
    for rank, row in enumerate(LOWERED.rows):
        for position, entry in enumerate(row):
            kinds = [entry.forward.kind, entry.backward.kind] if isinstance(entry, Overlap) else [entry.kind]
            if kind in kinds:
                with pytest.raises(
                    ScheduleError, match=f"rank {rank}, entry .*was done already, at rank {rank}"
                ):
                    with_row(LOWERED, rank, [*row[:position], entry, *row[position:]]).check()
                doubled += 1
    assert doubled


@pytest.mark.parametrize(
    ("rank", "first", "second", "message"),
    [
        (
            0,
            "0F2",
            "0I2",
            r"rank 0, entry 5 \(0I2\): 0I2 comes before its F",
        ),
        (1, "2F0'", "2B0'", r"rank 1, entry 5 \(2B0'\): 2B0' comes before its F"),
        (3, "3I0", "3W0", r"rank 3, entry \d+ \(3W0\): 3W0 comes before its I"),
        (0, "0F3+3B1'", "0F2", r"rank 0, entry \d+ \(0F3\+3B1'\): 3B1' comes before its F"),
        (1, "1F0", "1SA0", r"1SA0 sends the activation of stage 1, microbatch 0 before it is made"),
        (3, "3SG0", "3I0", r"3SG0 sends the gradient of stage 3, microbatch 0 before it is made"),
        (
            2,
            "2RA0",
            "2F0",
            r"rank 2, entry 0 \(2F0\): 2F0 comes before the receive of the activation of stage 1",
        ),
        (
            0,
            "0RG2",
            "0I2",
            r"0I2 comes before the receive of the gradient of stage 1, microbatch 2 is posted",
        ),
        (2, "2RA0", "2RA1", r"rank 2, entry \d+ \(2F0\): 2F0 comes before the receive"),
        (
            1,
            "1RG0",
            "2RA2'",
            r"rank 1, entry \d+ \(1RG0\) meets rank 2, entry \d+ \(1SA2'\); post receives in",
        ),
        (0, "3SG0'", "0SA2", "before it is made"),
        (3, "0SA0'", "0SA1'", "before it is made"),
    ],
)
def test_swapped_entries_are_named(rank: int, first: str, second: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        swapped(LOWERED, rank, first, second).check()


def test_receives_out_of_the_senders_order_are_found_though_each_is_early_enough() -> None:
    text = """two microbatches=2 placement=0,1
        0: 0F0 0SA0 0F1 0SA1 0RG0 0RG1 0B0 0B1
        1: 1RA1 1RA0 1F0 1B0 1SG0 1F1 1B1 1SG1"""
    with pytest.raises(ScheduleError, match=r"^rank 1, entry 0 \(1RA1\) meets rank 0, entry 1 \(0SA0\);"):
        Program.from_text(text).check()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (Action(Kind.FORWARD, 2, 0), "stage 2 of direction 0 is on rank 2, not here"),
        (Action(Kind.FORWARD, 4, 0), "stage 4 of 4F0; expected 0 to 3"),
        (Action(Kind.FORWARD, 0, 4), "microbatch 4 of 0F4; expected 0 to 3"),
        (Action(Kind.FORWARD, 0, 0, 2), "direction 2 of 0F0''; expected 0 to 1"),
        (Action(Kind.RECV_ACT, 0, 0), "0RA0 has no other rank to exchange with"),
        (Action(Kind.SEND_ACT, 3, 0, 1), "3SA0' has no other rank to exchange with"),
        (
            Overlap(Action(Kind.BACKWARD, 0, 0), Action(Kind.FORWARD, 0, 1)),
            "an overlap joins an F and a B, in this order",
        ),
        (
            Overlap(Action(Kind.FORWARD, 0, 0), Action(Kind.INPUT_GRAD, 0, 1)),
            "an overlap joins an F and a B, in this order",
        ),
    ],
)
def test_an_entry_that_cannot_be_there_is_named(entry: Action | Overlap, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        with_row(LOWERED, 0, [entry, *LOWERED.rows[0]]).check()
    assert str(caught.value) == f"rank 0, entry 0 ({entry}): {message}"


def single_row(entries: str) -> Program:
    return Program.from_text(f"row microbatches=1 placement=0\n0: {entries}")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("0B0", "rank 0: 0F0 is missing"),
        ("0F0", "rank 0: 0B0, or 0I0 and 0W0, is missing"),
        ("0F0 0I0", r"rank 0, entry 1 \(0I0\): its 0W0 is missing"),
        ("0F0 0W0", "rank 0: 0B0, or 0I0 and 0W0, is missing"),
        ("0F0 0B0 0W0", r"rank 0, entry 1 \(0B0\): part of it is done again, at rank 0, entry 2 \(0W0\)"),
        ("0F0 0I0 0B0 0W0", r"rank 0, entry 2 \(0B0\): part of it is done again"),
        ("0F0+0B0", r"rank 0, entry 0 \(0F0\+0B0\): 0B0 comes before its F"),
    ],
)
def test_a_microbatch_needs_one_forward_and_one_whole_backward(entries: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=f"^{message}"):
        single_row(entries).check()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("x microbatches=0 placement=0", "expected a positive multiple of 1 microbatches, got 0"),
        ("x microbatches=3 placement=0/0", "expected a positive multiple of 2 microbatches, got 3"),
        (
            "x microbatches=2 placement=0,1",
            "stage 1 of direction 0 is placed on rank 1; expected one of the 1 rows",
        ),
        ("x microbatches=2 placement=0,0/0", "expected the same stages in each direction, got 2 and 1"),
        ("x microbatches=3 placement=0/0/0", "expected 1 or 2 directions, got 3"),
    ],
)
def test_a_program_whose_shape_is_wrong_is_refused(header: str, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Program.from_text(f"{header}\n0: 0F0 0B0").check()
    assert str(caught.value) == f"schedule x: {message}"


CROSSED = """crossed microbatches=2 placement=0,1
    0: 0F0 0B0 0F1 0B1
    1: 1F1 1B1 1F0 1B0"""


@pytest.mark.parametrize("lowered", [False, True])
def test_a_deadlock_names_where_each_rank_is_blocked(lowered: bool) -> None:
    program = Program.from_text(CROSSED)
    program = schedule.add_transfers(program) if lowered else program
    with pytest.raises(ScheduleError) as caught:
        program.check()
    first, second = str(caught.value).removeprefix("schedule crossed: deadlock: ").split("; ")
    assert "(0B0) waits for the gradient of stage 1, microbatch 0 from rank 1" in first
    assert "(1F1) waits for the activation of stage 0, microbatch 1 from rank 0" in second
    assert first.startswith("rank 0, entry ") and second.startswith("rank 1, entry ")


def test_an_overlap_may_not_wait_for_itself_through_another_rank() -> None:
    # stage 1's backward is needed by the overlap whose forward it waits for
    program = Program.from_text("""loop microbatches=2 placement=0,1
        0: 0F0 0F1+0B0 0B1
        1: 1F0 1F1 1B0 1B1""")
    with pytest.raises(ScheduleError, match=r"deadlock: rank 0, entry 1 \(0F1\+0B0\) waits for the gradient"):
        program.check()


# The oracle runs the program; the checker only looks at it. They must agree on what random damage does.
SMALL = [
    schedule.lower(schedule.build(name, ranks, microbatches), prefetch)
    for name, ranks, microbatches in (
        ("1f1b", 2, 3),
        ("1f1b", 3, 3),
        ("interleaved", 2, 3),
        ("zb1p", 3, 3),
        ("zbv", 2, 3),
        ("dualpipe", 2, 4),
        ("dualpipe", 4, 8),
        ("dualpipev", 2, 4),
    )
    for prefetch in (0, 2)
]


@settings(max_examples=150, deadline=None)
@given(
    program=st.sampled_from(SMALL),
    swaps=st.integers(1, 2),
    reach=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_checker_and_mailbox_run_agree_on_random_swaps(
    program: Program, swaps: int, reach: int, seed: int
) -> None:
    rng = random.Random(seed)
    for _ in range(swaps):
        rank = rng.randrange(program.num_ranks)
        row = list(program.rows[rank])
        i = rng.randrange(len(row) - 1)
        j = min(len(row) - 1, i + reach)
        row[i], row[j] = row[j], row[i]
        program = with_row(program, rank, row)
    assert passes(program) == Mailboxes(program).run(rng)


def test_dualpipe_keeps_one_activation_more_than_ranks_alive_on_every_rank() -> None:
    for ranks in range(2, 17, 2):
        for microbatches in (2 * ranks, 2 * ranks + 2, max(2 * ranks, 64)):
            report = schedule.build("dualpipe", ranks, microbatches).check()
            assert report.peak_live == (ranks + 1,) * ranks
            assert max(report.peak_pending_weight_grads) == ranks // 2


@pytest.mark.parametrize("microbatches", [1, 2, 5, 6, 20])
def test_1f1b_keeps_as_many_activations_alive_as_ranks_follow(microbatches: int) -> None:
    report = schedule.build("1f1b", 6, microbatches).check()
    assert report.peak_live == tuple(min(6 - rank, microbatches) for rank in range(6))
    assert report.peak_pending_weight_grads == (0,) * 6


def test_a_single_rank_keeps_one_activation_alive() -> None:
    report = schedule.lower(schedule.build("single", 1, 7)).check()
    assert (report.peak_live, report.peak_posted_receives, report.peak_unmatched_sends) == ((1,), (0,), (0,))


def test_weight_gradients_owed_count_as_alive() -> None:
    program = Program.from_text("late microbatches=3 placement=0\n0: 0F0 0I0 0F1 0I1 0F2 0B2 0W0 0W1")
    report = program.check()
    assert (report.peak_live, report.peak_pending_weight_grads) == ((3,), (2,))


def test_messages_outstanding_do_not_grow_with_the_number_of_microbatches() -> None:
    reports = [schedule.lower(schedule.build("dualpipe", 4, micros)).check() for micros in (8, 16, 64)]
    assert {report.peak_posted_receives for report in reports} == {(2, 4, 4, 2)}
    assert {report.peak_unmatched_sends for report in reports} == {(3, 3, 3, 3)}


def test_unmatched_sends_are_counted_as_if_all_other_ranks_were_slow() -> None:
    # rank 1 posts both receives at once, but nothing tells rank 0 so before the first gradient
    program = Program.from_text("""two microbatches=2 placement=0,1
        0: 0F0 0SA0 0F1 0SA1 0RG0 0B0 0RG1 0B1
        1: 1RA0 1RA1 1F0 1B0 1SG0 1F1 1B1 1SG1""")
    report = program.check()
    assert report.peak_unmatched_sends == (2, 2)
    assert report.peak_posted_receives == (1, 2)
