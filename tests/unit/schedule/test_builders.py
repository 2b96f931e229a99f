"""The builders write the programs of their papers, and refuse sizes for which there is none."""

from collections import Counter
from pathlib import Path

import pytest

from moe_runtime import schedule
from moe_runtime.errors import ScheduleError
from moe_runtime.schedule import Entry, Overlap, Program

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "schedules").glob("*.txt"))
DUALPIPE_SIZES = [(ranks, micros) for ranks in range(2, 17, 2) for micros in range(2 * ranks, 65, 2)]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_programs_equal_the_golden_files(path: Path) -> None:
    name, ranks, microbatches, *lowered = path.stem.split("_")
    program = schedule.build(name, int(ranks[1:]), int(microbatches[1:]))
    assert (schedule.lower(program) if lowered else program).to_text() == path.read_text()


def test_there_are_golden_files_of_every_builder() -> None:
    assert {path.stem.split("_")[0] for path in GOLDEN} == set(schedule.BUILDERS)


def shape_of(program: Program, rank: int, entry: Entry) -> str:
    """An entry as seen from its rank: kinds, with n for the near and f for the far direction."""
    near = 0 if rank < program.num_ranks // 2 else 1
    parts = [entry.forward, entry.backward] if isinstance(entry, Overlap) else [entry]
    return "&".join(part.kind.value + ("n" if part.direction == near else "f") for part in parts)


def eight_steps(ranks: int, microbatches: int, rank: int) -> list[str]:
    """DualPipe's table of steps, written out; W without its lane, which the queue decides."""
    half, m = ranks // 2, microbatches // 2
    x = min(rank, ranks - 1 - rank)
    main = ["Fn&Bf", "Ff&Bn"] * (m - ranks + x + 1)
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
    ],
)
def test_inadmissible_sizes_are_refused_with_the_nearest_choice(
    name: str, ranks: int, microbatches: int, nearest: str
) -> None:
    with pytest.raises(ScheduleError, match=f"^schedule {name}: .*; expected .*; {nearest}$") as caught:
        schedule.build(name, ranks, microbatches)
    assert schedule.admissible(name, ranks, microbatches) == str(caught.value)


def test_an_unknown_schedule_is_refused_with_a_hint() -> None:
    with pytest.raises(ScheduleError, match="did you mean dualpipe"):
        schedule.build("dualpip", 2, 4)


def test_the_nearest_number_of_microbatches_is_admissible() -> None:
    assert schedule.nearest_microbatches("dualpipe", 4, 3) == 8
    assert schedule.nearest_microbatches("dualpipe", 4, 9) == 10
    assert schedule.nearest_microbatches("dualpipe", 4, 12) == 12
    assert schedule.nearest_microbatches("1f1b", 4, 0) == 1
    for name, ranks in (("single", 1), ("1f1b", 5), ("dualpipe", 6)):
        for asked in range(-3, 40):
            found = schedule.nearest_microbatches(name, ranks, asked)
            assert schedule.admissible(name, ranks, found) is None
    with pytest.raises(ScheduleError, match="3 pipeline ranks"):
        schedule.nearest_microbatches("dualpipe", 3, 8)
