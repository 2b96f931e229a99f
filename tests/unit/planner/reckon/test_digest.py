"""A program in counts says what the program says: its fullest moment exactly, its time never too high."""

import random

import pytest

from moe_runtime.planner.costs import Costs, StageCosts
from moe_runtime.planner.reckon.digest import digest
from moe_runtime.planner.reckon.kept import Live
from moe_runtime.planner.reckon.live import fullest
from moe_runtime.planner.simulate import simulate
from moe_runtime.schedule import BUILDERS, Program, add_transfers, admissible, build
from moe_runtime.schedule.passes import unpair

SIZES = ((1, 3), (2, 8), (4, 9), (4, 16), (6, 12), (8, 40))


def _programs() -> list[Program]:
    found = []
    for name in BUILDERS:
        for chunks in (2, 4) if name == "interleaved" else (None,):
            sizes = [size for size in SIZES if admissible(name, *size, chunks) is None]
            found += [build(name, *size, chunks) for size in sizes]
    return [*found, unpair(build("dualpipe", 4, 16))]


PROGRAMS = _programs()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: f"{one.name} {one.num_ranks} {one.num_stages}")
def test_the_bound_is_below_every_simulation(program: Program) -> None:
    draw = random.Random(program.num_stages)
    found = digest(program)
    for _ in range(4):
        stages = tuple(StageCosts(*(draw.uniform(0, 2) for _ in range(5))) for _ in range(program.num_stages))
        costs = Costs(stages, transfer=draw.choice((0.0, 0.3)), hidden=draw.choice((0.4, 1.0)))
        assert found.lower_bound(costs) <= simulate(program, costs).makespan


def test_the_bound_is_near_where_a_schedule_waits_little() -> None:
    # So near that a search settles most layouts by it; the figures are those that it has.
    for name, share in (("gpipe", 0.999), ("1f1b", 0.96), ("zb1p", 0.99), ("zbv", 0.99), ("dualpipe", 0.94)):
        program = build(name, 8, 40)
        costs = Costs.split(StageCosts(1, 1.2, 0.8, 0.8, 1.2), 8, program.num_stages, transfer=0.1)
        assert share < digest(program).lower_bound(costs) / simulate(program, costs).makespan <= 1


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda one: f"{one.name} {one.num_ranks} {one.num_stages}")
def test_the_fullest_moment_is_the_programs_own(program: Program) -> None:
    draw = random.Random(program.num_microbatches)
    found = digest(add_transfers(program))
    for _ in range(3):
        stages = [
            Live(tuple(draw.uniform(1, 9) for _ in range(draw.randint(1, 3))), draw.uniform(1, 9))
            for _ in range(program.num_stages)
        ]
        for rank, row in enumerate(found.rows):
            walked = fullest(program, rank, stages)
            assert row.fullest(stages) == pytest.approx(walked.nbytes, rel=1e-12)
            assert row.boundary == walked.received + walked.leaving
