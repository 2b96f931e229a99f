"""Passes keep a program right: transfers meet without tags, deferral comes off and on."""

import random

import pytest

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Action, Kind, Program
from moe_runtime.schedule.action import is_transfer
from tests.unit.schedule.mailbox import Mailboxes

SIZES = [
    ("single", 1, 3),
    ("1f1b", 1, 3),
    ("1f1b", 2, 4),
    ("1f1b", 5, 3),
    ("1f1b", 4, 12),
    ("dualpipe", 2, 4),
    ("dualpipe", 2, 6),
    ("dualpipe", 2, 8),
    ("dualpipe", 4, 8),
    ("dualpipe", 4, 10),
    ("dualpipe", 6, 18),
    ("dualpipe", 16, 32),
    ("gpipe", 3, 4),
    ("interleaved", 1, 2),
    ("interleaved", 2, 4),
    ("interleaved", 4, 7),
    ("zb1p", 4, 6),
    ("zbv", 1, 2),
    ("zbv", 2, 1),
    ("zbv", 4, 8),
    ("dualpipev", 1, 2),
    ("dualpipev", 2, 4),
    ("dualpipev", 5, 11),
]


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_lowered_programs_run_through_mailboxes_without_tags(
    name: str, ranks: int, microbatches: int, prefetch: int
) -> None:
    program = schedule.lower(schedule.build(name, ranks, microbatches), prefetch)
    for seed in range(3):
        assert Mailboxes(program).run(random.Random(seed))


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_lowering_adds_transfers_and_moves_nothing_else(name: str, ranks: int, microbatches: int) -> None:
    program = schedule.build(name, ranks, microbatches)
    lowered = schedule.lower(program)
    assert lowered.has_transfers == (ranks > 1)
    for row, added in zip(program.rows, lowered.rows, strict=True):
        assert row == tuple(entry for entry in added if not is_transfer(entry))


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_a_send_follows_the_entry_that_makes_its_tensor(name: str, ranks: int, microbatches: int) -> None:
    for row in schedule.lower(schedule.build(name, ranks, microbatches)).rows:
        computed = ""
        for entry in row:
            if not is_transfer(entry):
                computed = str(entry)
            elif entry.kind.is_send:  # type: ignore[union-attr]
                stage, kind, mark = entry.stage, entry.kind, "'" * entry.direction  # type: ignore[union-attr]
                makers = "F" if kind is Kind.SEND_ACT else "BI"
                wanted = {f"{stage}{maker}{entry.microbatch}{mark}" for maker in makers}  # type: ignore[union-attr]
                assert wanted & set(computed.split("+"))


def test_an_overlap_sends_its_activation_before_its_gradient() -> None:
    row = [str(entry) for entry in schedule.lower(schedule.build("dualpipe", 4, 8)).rows[1]]
    at = row.index("1F3+2B1'")
    assert row[at + 1 : at + 3] == ["1SA3", "2SG1'"]


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
def test_receives_are_posted_the_asked_number_of_computations_ahead(prefetch: int) -> None:
    program = schedule.lower(schedule.build("1f1b", 3, 8), prefetch)
    for row in program.rows:
        computations = [entry for entry in row if not is_transfer(entry)]
        seen = 0
        for entry in row:
            if not is_transfer(entry):
                seen += 1
            elif not entry.kind.is_send:  # type: ignore[union-attr]
                kind = Kind.FORWARD if entry.kind is Kind.RECV_ACT else Kind.BACKWARD  # type: ignore[union-attr]
                user = computations.index(Action(kind, entry.stage, entry.microbatch))  # type: ignore[union-attr]
                # earlier only where the same sender's next message is needed first, never in 1F1B
                assert seen == max(0, user - prefetch)


def test_a_receive_moves_up_when_a_later_message_of_its_sender_is_needed_first() -> None:
    # rank 0 makes microbatch 0 first, rank 1 wants microbatch 1 first
    program = Program.from_text("turn microbatches=2 placement=0,1\n0: 0F0 0F1 0B1 0B0\n1: 1F1 1B1 1F0 1B0")
    lowered = schedule.lower(program, prefetch=0)
    assert lowered.to_text().splitlines()[2] == "1: 1RA0 1RA1 1F1 1B1 1SG1 1F0 1B0 1SG0"
    assert Mailboxes(lowered).run(random.Random(0))


def test_stages_on_one_rank_exchange_nothing() -> None:
    program = Program.from_text("""loops microbatches=1 placement=0,0,1,0
        0: 0F0 1F0 3F0 3B0 1B0 0B0
        1: 2F0 2B0""")
    assert schedule.lower(program, prefetch=0).to_text() == (
        "loops microbatches=1 placement=0,0,1,0\n"
        "0: 0F0 1F0 1SA0 3RA0 3F0 3B0 3SG0 1RG0 1B0 0B0\n"
        "1: 2RA0 2F0 2SA0 2RG0 2B0 2SG0\n"
    )


def test_order_between_stages_on_one_rank_is_checked() -> None:
    program = Program.from_text("loops microbatches=1 placement=0,0\n0: 1F0 0F0 1B0 0B0")
    with pytest.raises(ScheduleError, match=r"entry 0 \(1F0\): 1F0 comes before the activation of stage 0"):
        program.check()


def test_transfers_are_added_once() -> None:
    lowered = schedule.lower(schedule.build("1f1b", 2, 2))
    with pytest.raises(ScheduleError, match="transfers were added already"):
        schedule.add_transfers(lowered)


def test_a_negative_prefetch_is_refused() -> None:
    with pytest.raises(ScheduleError, match="prefetch must be 0 or more, got -1"):
        schedule.lower(schedule.build("1f1b", 2, 2), prefetch=-1)


@pytest.mark.parametrize("lowered", [False, True])
def test_merging_takes_deferral_off_and_keeps_the_program_right(lowered: bool) -> None:
    program = schedule.build("dualpipe", 4, 10)
    program = schedule.lower(program) if lowered else program
    merged = schedule.merge_weight_grads(program)
    merged.check()
    assert "W" not in merged.to_text() and "I" not in merged.to_text()
    positions = [[str(e) for e in row if "W" not in str(e)] for row in program.rows]
    assert [[str(e) for e in row] for row in merged.rows] == [
        [text.replace("I", "B") for text in row] for row in positions
    ]


def test_splitting_defers_every_backward_that_stands_alone() -> None:
    program = schedule.build("dualpipe", 4, 8)
    split = schedule.split_backward(program)
    schedule.lower(split)
    assert not any(isinstance(e, Action) and e.kind is Kind.BACKWARD for row in split.rows for e in row)
    assert schedule.merge_weight_grads(split) == schedule.merge_weight_grads(program)


def test_a_split_backward_sends_its_gradient_before_its_weight_gradient() -> None:
    split = schedule.lower(schedule.split_backward(schedule.build("1f1b", 2, 1)))
    assert [str(entry) for entry in split.rows[1]] == ["1RA0", "1F0", "1I0", "1SG0", "1W0"]


def test_unpairing_puts_each_backward_right_after_its_forward() -> None:
    program = Program.from_text("""pair microbatches=2 placement=0,1
        0: 0F0 0F1+0B0 0B1
        1: 1F0 1B0 1F1 1B1""")
    assert [str(entry) for entry in schedule.unpair(program).rows[0]] == ["0F0", "0F1", "0B0", "0B1"]


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_passes_keep_every_program_right(name: str, ranks: int, microbatches: int) -> None:
    program = schedule.build(name, ranks, microbatches)
    for change in (schedule.merge_weight_grads, schedule.split_backward, schedule.unpair):
        changed = schedule.lower(change(program))
        assert Mailboxes(changed).run(random.Random(0))
    for change in (schedule.merge_weight_grads, schedule.unpair):
        changed = change(schedule.lower(program))
        changed.check()
        assert Mailboxes(changed).run(random.Random(0))
    assert "+" not in schedule.unpair(program).to_text()


def test_peers_of_a_transfer_name_each_other() -> None:
    program = schedule.lower(schedule.build("dualpipe", 4, 8))
    for rank, row in enumerate(program.rows):
        for entry in row:
            if isinstance(entry, Action) and entry.kind is Kind.SEND_ACT:
                receive = Action(Kind.RECV_ACT, entry.stage + 1, entry.microbatch, entry.direction)
                assert receive in program.rows[program.peer_of(entry)]
                assert program.peer_of(receive) == rank
