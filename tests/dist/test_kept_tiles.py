"""Tiles that stay tiles on 2 and 4 gloo ranks: one world runs all cases, a test reads one verdict."""

import pytest

from tests.dist.openings import run_each
from tests.dist.tile_cases import all_cases
from tests.ranks import run_ranks_once


def run_cases(rank: int, world_size: int, thorough: bool) -> dict[str, str]:
    """What failed on this rank, by case."""
    return run_each(all_cases(thorough), world_size)


def _require(world_size: int, thorough: bool, case: str) -> None:
    failures = run_ranks_once(run_cases, world_size, thorough, timeout_s=240.0)
    failed = {rank: found[case] for rank, found in enumerate(failures) if case in found}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


@pytest.mark.parametrize("case", all_cases(thorough=False))
def test_experts_get_the_values_that_decoding_gives(case):
    _require(4, False, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", all_cases(thorough=True))
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts_get_the_values_that_decoding_gives_for_every_routing(world_size, case):
    _require(world_size, True, case)
