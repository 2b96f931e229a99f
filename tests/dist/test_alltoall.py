"""The all-to-all dispatcher on 2 and 4 gloo ranks: one world runs all cases, a test reads one verdict."""

import multiprocessing
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_comm.errors import TransportError
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement

from tests.dist.exchange_cases import all_cases, run_cases
from tests.ranks import run_ranks


@pytest.fixture(scope="module", params=[2, 4], ids=lambda size: f"{size} ranks")
def failures(request):
    return run_ranks(run_cases, request.param)


@pytest.mark.parametrize("case", all_cases())
def test_every_rank_gets_what_the_plain_loops_give(failures, case):
    failed = {rank: failed[case] for rank, failed in enumerate(failures) if case in failed}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


def _exchange_until_a_peer_dies(rank: int, store: str, messages: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dispatcher = open_dispatcher("alltoall", Placement(4, 2, rank))
    inputs = torch.ones(8, 4), torch.ones(8, 2), torch.tensor([[0, 3]] * 8)
    received = dispatcher.dispatch(*inputs).wait()
    if rank == 1:
        os._exit(1)
    try:
        dispatcher.combine(received.rows, received.handle).wait()
    except TransportError as error:
        messages.put(str(error))


def test_a_dead_peer_ends_the_wait_with_a_named_error(tmp_path):
    context = multiprocessing.get_context("forkserver")
    messages = context.Queue()
    arguments = (str(tmp_path / "store"), messages)
    ranks = [
        context.Process(target=_exchange_until_a_peer_dies, args=(r, *arguments), daemon=True) for r in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        assert "rank 0 of 2: an all-to-all failed" in messages.get(timeout=30)
    finally:
        for process in ranks:
            process.kill()
