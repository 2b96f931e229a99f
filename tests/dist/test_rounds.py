"""A MoE layer in rounds on 2 and 4 gloo ranks: one world runs all cases, a test reads one verdict."""

import pytest

from tests.dist.round_cases import all_cases, run_cases
from tests.ranks import run_ranks

KINDS = {2: ("flat",), 4: ("flat", "two hops")}


@pytest.fixture(scope="module", params=KINDS, ids=lambda size: f"{size} ranks")
def world(request):
    return request.param, run_ranks(run_cases, request.param, KINDS[request.param])


@pytest.mark.parametrize("case", all_cases(("flat", "two hops")))
def test_rounds_give_what_one_piece_gives(world, case):
    size, failures = world
    if case not in all_cases(KINDS[size]):
        pytest.skip("two hops need two nodes of two ranks")
    failed = {rank: failed[case] for rank, failed in enumerate(failures) if case in failed}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())
