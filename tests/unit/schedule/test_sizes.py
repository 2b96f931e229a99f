"""Every builder is right for every size that it admits, and keeps its promise about memory."""

import random
from collections.abc import Iterator

import pytest

from moe_runtime import schedule
from moe_runtime.schedule import Program
from tests.unit.schedule.mailbox import Mailboxes

NAMES = [name for name in schedule.BUILDERS if name != "single"]


def programs(name: str, most_ranks: int, most_microbatches: int) -> Iterator[Program]:
    for ranks in range(1, most_ranks + 1):
        for microbatches in range(1, most_microbatches + 1):
            if schedule.admissible(name, ranks, microbatches) is None:
                for chunks in (2, 3) if name == "interleaved" else (None,):
                    yield schedule.build(name, ranks, microbatches, chunks)


def most_alive(program: Program, rank: int) -> int:
    """The bound in the builder's own text."""
    ranks, chunks = program.num_ranks, program.num_stages // program.num_ranks
    return {
        "gpipe": program.num_microbatches,
        "1f1b": ranks - rank,
        "interleaved": (chunks - 1) * ranks + 2 * (ranks - 1 - rank) + 1,
        "zb1p": ranks,
        "zbv": 2 * ranks,
        "dualpipe": ranks + 1,
        "dualpipev": 2 * ranks + 1,
    }[program.name]


def check_all(name: str, most_ranks: int, most_microbatches: int) -> None:
    """The checker on all, and the run through mailboxes on a sample; `lower` checks twice."""
    rng = random.Random(name)
    for program in programs(name, most_ranks, most_microbatches):
        lowered = schedule.lower(program)
        alive = program.check().peak_live
        assert all(peak <= most_alive(program, rank) for rank, peak in enumerate(alive))
        if rng.random() < 0.1:
            assert Mailboxes(lowered).run(rng)


@pytest.mark.parametrize("name", NAMES)
def test_small_sizes_are_right(name: str) -> None:
    check_all(name, most_ranks=5, most_microbatches=11)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_all_sizes_up_to_16_ranks_and_40_microbatches_are_right(name: str) -> None:
    check_all(name, most_ranks=16, most_microbatches=40)


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_on_activations_is_reached_once_the_pipeline_is_full(name: str) -> None:
    for ranks in (2, 4, 8):
        program = schedule.build(name, ranks, 4 * ranks)
        expected = tuple(most_alive(program, rank) for rank in range(ranks))
        assert program.check().peak_live == expected


def test_a_rank_holds_its_share_of_the_stages() -> None:
    held = {
        name: (program.check().stages_held, program.num_stages)
        for name in NAMES
        for program in [schedule.build(name, 4, 8)]
    }
    assert held == {
        "gpipe": ((1, 1, 1, 1), 4),
        "1f1b": ((1, 1, 1, 1), 4),
        "interleaved": ((2, 2, 2, 2), 8),
        "zb1p": ((1, 1, 1, 1), 4),
        "zbv": ((2, 2, 2, 2), 8),
        "dualpipe": ((2, 2, 2, 2), 4),  # twice the others' parameters
        "dualpipev": ((2, 2, 2, 2), 8),
    }
    assert Program.from_text(
        "one microbatches=2 placement=0/0\n0: 0F0 0B0 0F0' 0B0'"
    ).check().stages_held == (1,)
