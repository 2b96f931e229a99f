"""The builders write the programs of their papers, and refuse sizes for which there is none."""

import sys
from collections import Counter
from pathlib import Path

import pytest

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Entry, Overlap, Program
from moe_runtime.schedule.builders import BUILDERS
from moe_runtime.schedule.lanes import Lane, Row
from tests.unit.schedule.figure import figure

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "schedules").glob("*.txt"))
DUALPIPE_SIZES = [(ranks, micros) for ranks in range(2, 17, 2) for micros in range(2 * ranks, 65, 2)]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_programs_equal_the_golden_files(path: Path) -> None:
    name, ranks, microbatches, *rest = path.stem.split("_")
    chunks = next((int(part[1:]) for part in rest if part[0] == "v"), None)
    program = schedule.build(name, int(ranks[1:]), int(microbatches[1:]), chunks)
    assert (schedule.lower(program) if "lowered" in rest else program).to_text() == path.read_text()


def test_there_are_golden_files_of_every_builder() -> None:
    assert {path.stem.split("_")[0] for path in GOLDEN} == set(schedule.BUILDERS)


SIZES_OF_FIGURES = {
    "gpipe": (4, 4),
    "1f1b": (4, 6),
    "interleaved": (4, 8),
    "zb1p": (4, 6),
    "zbv": (4, 8),
    "dualpipe": (4, 8),
    "dualpipev": (4, 8),
    "single": (1, 4),
}


@pytest.mark.parametrize("name", schedule.BUILDERS)
def test_the_figure_in_each_builders_file_is_its_program_on_the_clock(name: str) -> None:
    text = sys.modules[BUILDERS[name].make.__module__].__doc__
    program = schedule.build(name, *SIZES_OF_FIGURES[name])
    assert text is not None and any(figure(program, parts) in text for parts in (1, 2))


def shape_of(program: Program, rank: int, entry: Entry) -> str:
    """An entry as seen from its rank: kinds, with n for its near stage and f for its far one."""
    parts = [entry.forward, entry.backward] if isinstance(entry, Overlap) else [entry]
    middle = program.num_stages // 2
    return "&".join(part.kind.value + ("n" if part.stage < middle else "f") for part in parts)


def eight_steps(half: int, m: int, x: int) -> list[str]:
    """DualPipe's table of steps, written out; W without its lane, which the queue decides."""
    main = ["Fn&Bf", "Ff&Bn"] * (m - 2 * half + x + 1)
    if x == half - 1:
        main = ["Fn", "Bf", *main[1:]]
    last = ["Bf", "Bn"] * (x + 1)
    last[x + 1 :] = [each.replace("B", "I") for each in last[x + 1 :]]
    return [
        *["Fn"] * (2 * (half - x - 1)),
        *["Fn", "Ff"] * (x + 1),
        *["If", "W", "Ff"] * (half - x - 1),
        *main,
        *["Bf", "Ff&Bn"] * (half - x - 1),
        *last,
        *["W", "In"] * (half - x - 1),
        *["W"] * (x + 1),
    ]


def test_dualpipe_rows_are_the_eight_steps_for_all_sizes() -> None:
    for ranks, microbatches in DUALPIPE_SIZES:
        program = schedule.build("dualpipe", ranks, microbatches)
        for rank, row in enumerate(program.rows):
            shapes = [shape_of(program, rank, entry) for entry in row]
            shapes = ["W" if shape[0] == "W" else shape for shape in shapes]
            expected = eight_steps(ranks // 2, microbatches // 2, min(rank, ranks - 1 - rank))
            assert shapes == expected, (ranks, microbatches, rank)


def test_dualpipev_rows_are_the_eight_steps_for_all_sizes() -> None:
    for ranks in range(1, 9):
        for microbatches in range(2 * ranks, 2 * ranks + 9):
            program = schedule.build("dualpipev", ranks, microbatches)
            for rank, row in enumerate(program.rows):
                shapes = [shape_of(program, rank, entry) for entry in row]
                shapes = ["W" if shape[0] == "W" else shape for shape in shapes]
                assert shapes == eight_steps(ranks, microbatches, rank), (ranks, microbatches, rank)


def test_dualpipe_defers_as_many_weight_gradients_as_the_paper() -> None:
    for ranks, microbatches in DUALPIPE_SIZES:
        program = schedule.build("dualpipe", ranks, microbatches)
        for rank, row in enumerate(program.rows):
            x = min(rank, ranks - 1 - rank)
            counts = Counter(
                shape_of(program, rank, entry)[0] for entry in row if not isinstance(entry, Overlap)
            )
            assert counts["I"] == counts["W"] == ranks - x - 1


def test_dualpipe_is_its_own_mirror_image() -> None:
    program = schedule.build("dualpipe", 6, 14)
    for rank, row in enumerate(program.rows):
        mirrored = program.rows[5 - rank]
        for entry, twin in zip(row, mirrored, strict=True):
            assert str(entry).replace("'", "") == str(twin).replace("'", "")
            assert shape_of(program, rank, entry) == shape_of(program, 5 - rank, twin)


def test_each_rank_of_dualpipe_holds_a_stage_of_either_end() -> None:
    program = schedule.build("dualpipe", 4, 8)
    assert [program.stages_of(rank) for rank in range(4)] == [
        ((0, 0), (1, 3)),
        ((0, 1), (1, 2)),
        ((0, 2), (1, 1)),
        ((0, 3), (1, 0)),
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches", "nearest"),
    [
        ("single", 2, 4, "nearest: 1"),
        ("single", 1, 0, "nearest: 1"),
        ("1f1b", 0, 4, "nearest: 1"),
        ("1f1b", 2, -3, "nearest: 1"),
        ("dualpipe", 1, 4, "nearest: 2"),
        ("dualpipe", 3, 12, "nearest: 2 or 4"),
        ("dualpipe", 4, 6, "nearest: 8"),
        ("dualpipe", 4, 9, "nearest: 8 or 10"),
        ("dualpipe", 2, 2, "nearest: 4"),
        ("dualpipev", 3, 5, "nearest: 6"),
        ("gpipe", 2, 0, "nearest: 1"),
        ("interleaved", 0, 4, "nearest: 1"),
        ("zb1p", 2, 0, "nearest: 1"),
        ("zbv", -1, 4, "nearest: 1"),
    ],
)
def test_inadmissible_sizes_are_refused_with_the_nearest_choice(
    name: str, ranks: int, microbatches: int, nearest: str
) -> None:
    with pytest.raises(ScheduleError, match=f"^schedule {name}: .*; expected .*; {nearest}$") as caught:
        schedule.build(name, ranks, microbatches)
    assert schedule.admissible(name, ranks, microbatches) == str(caught.value)


def test_a_shorter_last_round_of_interleaved_may_deadlock() -> None:
    """Why the last round is not simply made shorter: 5 ranks, 7 microbatches, counted through."""
    rows = []
    for rank in range(5):
        lanes = [Lane(rank), Lane(5 + rank)]
        forwards = [lane for size in (5, 2) for lane in lanes for _ in range(size)]
        backwards = [lane for size in (5, 2) for lane in lanes[::-1] for _ in range(size)]
        row, ahead = Row(), 5 + 2 * (4 - rank)
        for turn in range(len(forwards) + ahead):
            if turn < len(forwards):
                row.forward(forwards[turn])
            if turn >= ahead:
                row.backward(backwards[turn - ahead])
        rows.append(tuple(row.entries))
    program = Program("shorter", tuple(rows), schedule.placement_of("interleaved", 5), 7)
    with pytest.raises(ScheduleError, match="deadlock: rank 0"):
        program.check()


@pytest.mark.parametrize(
    ("name", "chunks", "message"),
    [
        ("interleaved", 1, "1 stages a rank and direction; expected at least 2; nearest: 2"),
        ("1f1b", 2, "2 stages a rank and direction; expected 1, and no other"),
        ("dualpipe", 2, "2 stages a rank and direction; expected 1, and no other"),
        ("zbv", 1, "1 stages a rank and direction; expected 2, and no other"),
        ("dualpipev", 3, "3 stages a rank and direction; expected 2, and no other"),
    ],
)
def test_chunks_that_a_schedule_has_not_are_refused(name: str, chunks: int, message: str) -> None:
    assert schedule.admissible(name, 2, 8, chunks) == f"schedule {name}: {message}"
    for refuse in (
        lambda: schedule.build(name, 2, 8, chunks),
        lambda: schedule.placement_of(name, 2, chunks),
        lambda: schedule.nearest_microbatches(name, 2, 8, chunks),
    ):
        with pytest.raises(ScheduleError, match=f"^schedule {name}: {message}$"):
            refuse()


def test_the_chunks_that_a_schedule_has_may_be_asked_for() -> None:
    for name, chunks in (("1f1b", 1), ("zbv", 2), ("dualpipe", 1), ("dualpipev", 2), ("interleaved", 2)):
        assert schedule.build(name, 2, 4, chunks) == schedule.build(name, 2, 4)


def test_placements_are_known_without_building() -> None:
    assert schedule.placement_of("1f1b", 3) == ((0, 1, 2),)
    assert schedule.placement_of("interleaved", 2, 3) == ((0, 1, 0, 1, 0, 1),)
    assert schedule.placement_of("zbv", 3) == schedule.placement_of("dualpipev", 3) == ((0, 1, 2, 2, 1, 0),)
    assert schedule.placement_of("dualpipe", 4) == ((0, 1, 2, 3), (3, 2, 1, 0))
    for name in schedule.BUILDERS:
        ranks = 1 if name == "single" else 4
        assert schedule.build(name, ranks, 8).placement == schedule.placement_of(name, ranks)
    with pytest.raises(ScheduleError, match="3 pipeline ranks"):
        schedule.placement_of("dualpipe", 3)


def test_an_unknown_schedule_is_refused_with_a_hint() -> None:
    with pytest.raises(ScheduleError, match="did you mean dualpipe"):
        schedule.build("dualpip", 2, 4)


def test_the_nearest_number_of_microbatches_is_admissible() -> None:
    assert schedule.nearest_microbatches("dualpipe", 4, 3) == 8
    assert schedule.nearest_microbatches("dualpipe", 4, 9) == 10
    assert schedule.nearest_microbatches("dualpipe", 4, 12) == 12
    assert schedule.nearest_microbatches("1f1b", 4, 0) == 1
    for name, ranks in (("single", 1), ("1f1b", 5), ("dualpipe", 6), ("dualpipev", 5), ("interleaved", 3)):
        for asked in range(-3, 40):
            found = schedule.nearest_microbatches(name, ranks, asked)
            assert schedule.admissible(name, ranks, found) is None
    with pytest.raises(ScheduleError, match="3 pipeline ranks"):
        schedule.nearest_microbatches("dualpipe", 3, 8)
