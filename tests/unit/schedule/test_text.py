"""The text form loses nothing, and says which token it does not understand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Action, Kind, Overlap, Program

numbers = st.integers(0, 300)
directions = st.integers(0, 1)
actions = st.builds(Action, st.sampled_from(Kind), numbers, numbers, directions)
overlaps = st.builds(
    Overlap,
    st.builds(Action, st.just(Kind.FORWARD), numbers, numbers, directions),
    st.builds(Action, st.just(Kind.BACKWARD), numbers, numbers, directions),
)
rows = st.lists(st.lists(actions | overlaps, max_size=4).map(tuple), max_size=3).map(tuple)
placements = st.lists(st.lists(numbers, min_size=1, max_size=5).map(tuple), min_size=1, max_size=2).map(tuple)
names = st.from_regex(r"[a-z0-9][a-z0-9_.-]*", fullmatch=True)
programs = st.builds(Program, names, rows, placements, numbers)


@settings(max_examples=60, deadline=None)
@given(programs)
def test_any_program_survives_the_round_trip(program: Program) -> None:
    assert Program.from_text(program.to_text()) == program


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [
        ("single", 1, 2),
        ("gpipe", 3, 4),
        ("1f1b", 3, 4),
        ("interleaved", 3, 4),
        ("zb1p", 3, 4),
        ("zbv", 3, 4),
        ("dualpipe", 4, 10),
        ("dualpipev", 3, 7),
    ],
)
def test_built_and_lowered_programs_survive_the_round_trip(name: str, ranks: int, microbatches: int) -> None:
    program = schedule.build(name, ranks, microbatches)
    for each in (program, schedule.lower(program)):
        text = each.to_text()
        assert Program.from_text(text) == each
        assert Program.from_text(text).to_text() == text


def test_an_action_is_written_as_stage_kind_microbatch_and_direction() -> None:
    assert str(Action(Kind.FORWARD, 3, 5)) == "3F5"
    assert str(Overlap(Action(Kind.FORWARD, 3, 5), Action(Kind.BACKWARD, 4, 1, 1))) == "3F5+4B1'"
    assert str(Action(Kind.SEND_ACT, 3, 5)) == "3SA5"
    assert str(Action(Kind.RECV_GRAD, 0, 12, 1)) == "0RG12'"


def test_blank_lines_and_comments_are_skipped() -> None:
    text = "# a program\n\nx microbatches=1 placement=0\n  # its row\n0: 0F0 0B0\n\n"
    assert Program.from_text(text).to_text() == "x microbatches=1 placement=0\n0: 0F0 0B0\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a header .* got an empty text"),
        ("x placement=0\n0: 0F0", "expected a header 'NAME microbatches=M placement=.*, got 'x placement=0'"),
        ("x microbatches=1 placement=0,\n0: 0F0", "header: expected .*, got placement=0,"),
        ("x microbatches=1 placement=0\n1: 0F0", "row 0: expected '0: ENTRY ENTRY ...', got '1: 0F0'"),
        ("x microbatches=1 placement=0\n0: 0F0\n0F0", "row 1: expected '1: ENTRY ENTRY ...', got '0F0'"),
        ("x microbatches=1 placement=0\n0: 0F0 0X0", "row 0: expected an action .*, got '0X0'"),
        ("x microbatches=1 placement=0\n0: 0F", "row 0: expected an action .*, got '0F'"),
        ("x microbatches=1 placement=0\n0: 0f0", "row 0: .*, got '0f0'"),
        ("x microbatches=1 placement=0\n0: 0F0+", "row 0: .*, got '0F0\\+'"),
        ("x microbatches=1 placement=0\n0: 0B0+0F0", "row 0: .*, got '0B0\\+0F0'"),
        ("x microbatches=1 placement=0\n0: 0F0+0B0+0B1", "row 0: .*, got '0F0\\+0B0\\+0B1'"),
    ],
)
def test_malformed_text_is_refused_with_row_and_token(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=f"^schedule text: {message}"):
        Program.from_text(text)
