"""Every schedule computes the plain model's gradients: ranks x microbatches x schedule, in FP64.

The layouts of `test_layout_invariance` vary everything but the schedule; here it is the schedule alone,
with expert parallelism where the ranks allow, so that exchanges run under every order of actions.
"""

from collections.abc import Iterator

import pytest

from moe_runtime.schedule.builders import BUILDERS, admissible
from tests.dist.layout_case import Case, compare_gradients
from tests.ranks import run_ranks

TOLERANCE = 1e-10
MICROBATCHES = (1, 2, 3, 5, 8)
NAMES = (*BUILDERS, "searched", "auto")
# (ranks of the world, pipeline ranks, expert-parallel ranks) with the layers that give each stage one
MESHES = {1: ((1, 1),), 2: ((2, 1),), 4: ((4, 1), (2, 2)), 8: ((8, 1), (4, 2))}


def _cases(pp: int, ep: int, microbatches: tuple[int, ...]) -> Iterator[Case]:
    for name in NAMES:
        counts = [m for m in microbatches if name not in BUILDERS or admissible(name, pp, m) is None]
        least = 2 * pp if name.startswith("dualpipe") and admissible(name, pp, 2 * pp) is None else None
        for count in sorted({*counts, *([least, least + 2] if least else [])}):
            layout = {"pp": pp, "dp": ep, "ep": ep, "schedule": name}
            model = {"num_layers": max(4, 2 * pp)}
            yield Case(f"{name} pp {pp} ep {ep} M {count}", layout, count, mtp_depth=count % 2, model=model)


def _gradients(rank: int, world_size: int, cases: list[Case]) -> dict[str, dict[str, float]]:
    return {case.name: compare_gradients(case, rank) for case in cases}


def _check(world_size: int, cases: list[Case], timeout_s: float = 300) -> None:
    for rank, found in enumerate(run_ranks(_gradients, world_size, cases, timeout_s=timeout_s)):
        for name, worst in found.items():
            bad = {what: number for what, number in worst.items() if not number <= TOLERANCE}
            assert not bad, f"{name}, rank {rank}: beyond {TOLERANCE}: {bad}"


# What one rank or two can do wrong four can too: these, and more microbatches, are left to the slow tests.
@pytest.mark.parametrize("world_size", [*(pytest.param(few, marks=pytest.mark.slow) for few in (1, 2)), 4])
def test_gradients_of_every_schedule_are_those_of_the_plain_model(world_size: int) -> None:
    microbatches = MICROBATCHES if world_size < 4 else (6,)
    _check(world_size, [case for mesh in MESHES[world_size] for case in _cases(*mesh, microbatches)])


@pytest.mark.slow
def test_gradients_of_every_schedule_with_one_microbatch_and_an_odd_number() -> None:
    _check(4, [case for mesh in MESHES[4] for case in _cases(*mesh, (1, 3))])


@pytest.mark.slow
def test_gradients_of_every_schedule_on_eight_ranks() -> None:
    _check(8, [case for mesh in MESHES[8] for case in _cases(*mesh, (1, 4, 11))], timeout_s=900)


@pytest.mark.slow
def test_gradients_of_more_chunks_and_of_less_memory() -> None:
    layouts = [{"schedule": "interleaved", "chunks": chunks} for chunks in (2, 3)]
    layouts += [{"schedule": "searched", "chunks": 1}, {"schedule": "searched", "chunks": 4}]
    layouts += [{"schedule": "searched", "chunks": 4, "max_live": 1.25}]
    cases = [
        Case(f"{layout} M {m}", {"pp": 2, **layout}, m, 1, model={"num_layers": 8})
        for layout in layouts
        for m in (1, 3, 4)
    ]
    _check(2, cases)


@pytest.mark.parametrize(
    "schedule",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("dualpipe", "zbv", "dualpipev", "interleaved")],
)
def test_recompute_and_no_overlap_change_no_gradient(schedule: str) -> None:
    cases = [
        Case(f"{schedule} overlap {overlap} recompute {again}", layout, 4, 1, recompute=again)
        for overlap in (True, False)
        for again in (True, False)
        for layout in [{"pp": 2, "dp": 2, "ep": 2, "schedule": schedule, "overlap": overlap}]
    ]
    _check(4, cases)
