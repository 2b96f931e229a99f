"""A MoE layer in rounds on 2 and 4 gloo ranks: one world runs all cases, a test reads one verdict."""

import pytest

from tests.dist.round_cases import FEW, MANY, all_cases, run_cases
from tests.ranks import run_ranks_once

KINDS = {2: ("flat",), 4: ("flat", "two hops")}


def _params(bounds: tuple[int, ...], *sizes: int) -> list:
    cases = [(size, case) for size in sizes for case in all_cases(KINDS[size], bounds)]
    return [pytest.param(size, case, id=f"{size} ranks, {case}") for size, case in cases]


def _check(size: int, bounds: tuple[int, ...], case: str) -> None:
    failures = run_ranks_once(run_cases, size, KINDS[size], bounds, timeout_s=240.0)
    failed = {rank: found[case] for rank, found in enumerate(failures) if case in found}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


@pytest.mark.parametrize(("size", "case"), _params(MANY, 4))
def test_rounds_give_what_one_piece_gives(size, case):
    _check(size, MANY, case)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), _params(MANY, 2))
def test_rounds_of_two_ranks_give_what_one_piece_gives(size, case):
    _check(size, MANY, case)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "case"), _params(FEW, 2, 4))
def test_very_small_rounds_give_what_one_piece_gives(size, case):
    _check(size, FEW, case)
