"""The MPI transport on 2 and 4 ranks: one job runs all cases, a test reads one verdict."""

import subprocess
import sys

import pytest

from tests.dist import mpi_cases
from tests.mpi_ranks import launch, run_mpi_ranks, why_no_mpi
from tests.ranks import run_ranks

pytestmark = [pytest.mark.mpi, pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")]


@pytest.fixture(
    scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4], ids=lambda size: f"{size} ranks"
)
def outcome(request):
    """Also shows that a program which used the transport exits with status 0."""
    return run_mpi_ranks(mpi_cases.run_cases, request.param)


@pytest.mark.parametrize("case", mpi_cases.all_cases())
def test_every_rank_keeps_the_promise(outcome, case):
    failed = {rank: failures[case] for rank, (failures, _) in enumerate(outcome) if case in failures}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


def test_the_bits_are_those_that_gloo_brings(outcome):
    over_gloo = run_ranks(mpi_cases.received_over_gloo, len(outcome))
    assert [received for _, received in outcome] == over_gloo


def test_a_rank_that_raises_ends_the_job_and_the_others_say_why():
    ended = launch(mpi_cases.end_early, 2, "raises")
    assert ended.code not in (0, None), ended.stderr
    assert "planted" in ended.tracebacks[1]
    assert "rank 0 of 2: exchange 2 over MPI failed: rank 1 ended after 1 exchanges" in ended.tracebacks[0]
    assert ended.seconds < 20


@pytest.mark.slow
def test_a_rank_that_exits_ends_the_wait_of_the_others():
    ended = launch(mpi_cases.end_early, 4, "exits")
    assert ended.code not in (0, None), ended.stderr
    assert sorted(ended.tracebacks) == [0, 2, 3]
    assert all("rank 1 ended after 1 exchanges" in text for text in ended.tracebacks.values())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["is killed", "leaves"])
def test_mpiexec_ends_the_job_of_a_rank_that_vanishes(how):
    ended = launch(mpi_cases.end_early, 2, how)
    assert ended.code not in (0, None), ended.stderr
    assert ended.seconds < 20


@pytest.mark.slow
def test_a_rank_that_raises_does_not_wait_for_ranks_that_compute():
    ended = launch(mpi_cases.raise_while_others_compute, 2)
    assert ended.code not in (0, None), ended.stderr
    assert ended.seconds < 20


@pytest.mark.slow
def test_ranks_that_end_without_waiting_end_well():
    assert run_mpi_ranks(mpi_cases.end_without_waiting, 4) == [None] * 4


@pytest.mark.slow
def test_one_message_may_be_longer_than_2_gib():
    run_mpi_ranks(mpi_cases.exchange_more_than_2_gib, 2)


@pytest.mark.slow
def test_an_mpi_for_one_thread_is_refused_in_one_line():
    program = (
        "import mpi4py; mpi4py.rc.thread_level = 'serialized'\n"
        "from moe_comm.transport_mpi import MpiTransport\n"
        "try: MpiTransport()\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("TransportError expected MPI at thread level MULTIPLE")
    assert done.stdout.count("\n") == 1
