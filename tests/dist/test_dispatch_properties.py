"""All dispatchers on all wires and transports against the oracle, on routings drawn at random."""

import pytest

from tests.dist import property_cases
from tests.dist.property_cases import Example, Outcome
from tests.mpi_ranks import run_mpi_ranks, why_no_mpi
from tests.ranks import run_ranks, run_ranks_once

FEW = {1: 4, 2: 5, 4: 4}
MANY = {1: 60, 2: 80, 4: 60, 8: 25}


def _over_gloo(world_size: int, number: int, seed: int) -> list[Outcome]:
    return run_ranks_once(property_cases.search, world_size, number, seed, timeout_s=900.0)


def _require_no_failure(world_size: int, number: int, seed: int) -> list[Example]:
    outcome = _over_gloo(world_size, number, seed)[0]
    assert outcome.failure is None, outcome.failure
    # Hypothesis may find that it has drawn an example before; nearly all are new.
    assert len(outcome.examples) >= number // 2
    return outcome.examples


def _require_same_over_mpi(world_size: int, number: int, seed: int, replayed: int) -> None:
    examples = _require_no_failure(world_size, number, seed)[:replayed]
    over_mpi = run_mpi_ranks(property_cases.replay_over_mpi, world_size, examples, timeout_s=900.0)
    over_gloo = [outcome.digests[:replayed] for outcome in _over_gloo(world_size, number, seed)]
    assert [outcome.digests for outcome in over_mpi] == over_gloo


@pytest.mark.parametrize("world_size", FEW)
def test_any_routing_gives_what_the_oracle_gives(world_size):
    _require_no_failure(world_size, FEW[world_size], seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", MANY)
def test_many_routings_give_what_the_oracle_gives(world_size):
    _require_no_failure(world_size, MANY[world_size], seed=1)


needs_mpi = pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")


@pytest.mark.mpi
@needs_mpi
def test_mpi_brings_the_bits_that_gloo_brings():
    _require_same_over_mpi(2, FEW[2], seed=0, replayed=2)


@pytest.mark.slow
@pytest.mark.mpi
@needs_mpi
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_mpi_brings_the_bits_that_gloo_brings_for_many_routings(world_size):
    _require_same_over_mpi(world_size, MANY[world_size], seed=1, replayed=12)


def test_a_wrong_result_is_found_and_shrunk_on_all_ranks():
    outcomes = run_ranks(property_cases.search_with_a_fault, 2, 20, 0)
    assert all(outcome.failure is not None for outcome in outcomes)
    assert "rank 1: " in outcomes[0].failure and "rank 0: " not in outcomes[0].failure
    assert "counts=(0, 1)" in outcomes[0].failure
