"""The dispatchers on gloo ranks: one world runs all cases of a file, a test reads one verdict."""

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe_comm import moe_layer
from moe_comm.errors import CommError, TransportError
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement

from tests.dist import exchange_cases, flight_cases, opening_cases, refusal_cases, traffic_cases
from tests.dist.openings import run_each
from tests.ranks import run_ranks, run_ranks_once

WORLDS = [pytest.param(size, marks=pytest.mark.slow) for size in (2, 8)] + [4]


def run_plain_cases(rank: int, world_size: int) -> dict[str, str]:
    """All cases but those of `exchange_cases` in one world."""
    files = {
        "traffic": traffic_cases,
        "opening": opening_cases,
        "refusal": refusal_cases,
        "flight": flight_cases,
    }
    cases = {f"{name}, {case}": run for name, file in files.items() for case, run in file.all_cases().items()}
    return run_each(cases, world_size)


def _require(run: Callable, world_size: int, case: str, *arguments: object) -> None:
    failures = run_ranks_once(run, world_size, *arguments, timeout_s=240.0)
    failed = {rank: found[case] for rank, found in enumerate(failures) if case in found}
    assert not failed, "\n".join(f"rank {rank}:\n{text}" for rank, text in failed.items())


@pytest.mark.parametrize("case", exchange_cases.all_cases(thorough=False))
def test_every_rank_gets_what_the_plain_loops_give(case):
    _require(exchange_cases.run_cases, 4, case, False)


@pytest.mark.slow
@pytest.mark.parametrize("case", exchange_cases.all_cases(thorough=True))
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_rank_gets_what_the_plain_loops_give_with_every_dtype(world_size, case):
    _require(exchange_cases.run_cases, world_size, case, True)


@pytest.mark.parametrize("case", traffic_cases.all_cases())
@pytest.mark.parametrize("world_size", WORLDS)
def test_traffic_is_counted_to_the_byte(world_size, case):
    _require(run_plain_cases, world_size, f"traffic, {case}")


@pytest.mark.parametrize("case", opening_cases.all_cases())
@pytest.mark.parametrize("world_size", WORLDS)
def test_dispatchers_open_alike_on_all_ranks_or_not_at_all(world_size, case):
    _require(run_plain_cases, world_size, f"opening, {case}")


@pytest.mark.parametrize("case", refusal_cases.all_cases())
@pytest.mark.parametrize("world_size", WORLDS)
def test_a_mistake_is_told_to_all_ranks_and_spoils_nothing(world_size, case):
    _require(run_plain_cases, world_size, f"refusal, {case}")


@pytest.mark.parametrize("case", flight_cases.all_cases())
@pytest.mark.parametrize("world_size", WORLDS)
def test_timing_changes_nothing(world_size, case):
    _require(run_plain_cases, world_size, f"flight, {case}")


def _exchange_until_a_peer_dies(rank: int, store: str, kind: str, messages: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dispatcher = open_dispatcher(kind, Placement(4, 2, rank, ranks_per_node=1))
    inputs = torch.ones(8, 4), torch.ones(8, 2), torch.tensor([[0, 3]] * 8)
    received = dispatcher.dispatch(*inputs).wait()
    if rank == 1:
        os._exit(1)
    try:
        dispatcher.combine(received.rows, received.handle).wait()
    except TransportError as error:
        messages.put(str(error))


def _go_on_after_a_failure(rank: int, world_size: int) -> list[str]:
    dispatcher = open_dispatcher("alltoall", Placement(4, world_size, rank))
    inputs = torch.ones(8, 4), torch.ones(8, 2), torch.tensor([[0, 3]] * 8)
    dispatcher.dispatch(*inputs).wait()

    def fail(*_: Any) -> None:
        raise MemoryError("planted")

    if rank == 1:
        dispatcher._send = fail
    raised = []
    for _ in range(2):
        try:
            dispatcher.dispatch(*inputs).wait()
        except (MemoryError, CommError) as error:
            raised.append(type(error).__name__)
    return raised


def test_a_rank_that_fails_between_counts_and_rows_leaves_no_peer_with_wrong_rows():
    others, failed = run_ranks(_go_on_after_a_failure, 2, timeout_s=30.0)
    assert failed == ["MemoryError", "TransportError"]
    assert others == ["TransportError", "TransportError"]


def _raise_in_experts(rank: int, world_size: int, kind: str, max_rows: int | None) -> list[str]:
    placement = Placement(4, world_size, rank, ranks_per_node=1)
    dispatcher = open_dispatcher(kind, placement, max_rows=max_rows)
    inputs = torch.ones(8, 4), torch.ones(8, 2), torch.tensor([[0, 3]] * 8)

    def experts(rows: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        if rank == 1:
            raise ValueError("planted")
        return rows

    raised = []
    for _ in range(2):
        try:
            moe_layer(dispatcher, *inputs, experts, [])
        except (ValueError, CommError) as error:
            raised.append(type(error).__name__)
    time.sleep(1.0)  # alive all the while
    return raised


@pytest.mark.parametrize(("kind", "max_rows"), [("alltoall", None), ("two_hop", 8)])
def test_experts_that_raise_on_one_rank_leave_no_peer_waiting(kind, max_rows):
    others, failed = run_ranks(_raise_in_experts, 2, kind, max_rows, timeout_s=30.0)
    assert failed == ["ValueError", "TransportError"]
    assert others == ["TransportError", "TransportError"]


LEAVE = """
import sys, torch, torch.distributed as dist
from moe_comm import Placement, open_dispatcher
how, rank, store, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
dispatcher = open_dispatcher(kind, Placement(4, 2, rank, ranks_per_node=1))
tokens = 200000 if how == "forgets" else 20000  # more than sockets hold
inputs = torch.ones(tokens, 256), torch.ones(tokens, 2), torch.tensor([[0, 3]]).expand(tokens, 2)
pending = dispatcher.dispatch(*inputs)
if how == "raises" and rank == 0:
    raise ValueError("planted")
if how == "late" and rank == 1:
    pending.wait()
if how == "forgets":
    received = pending.wait()
    if rank == 0:
        dispatcher.combine(received.rows, received.handle)
    else:
        dispatcher.combine(received.rows, received.handle).wait()
if how == "drops":
    received = pending.wait()
    dispatcher.combine(received.rows, received.handle)
    del dispatcher
    dist.destroy_process_group()
"""


def _leave(how: str, kind: str, folder: Path) -> list[int]:
    """Exit codes of two processes that end with operations under way."""
    store, environment = str(folder / "store"), {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LEAVE, how]
    ranks = [
        subprocess.Popen([*command, str(rank), store, kind], env=environment, stderr=subprocess.DEVNULL)
        for rank in (0, 1)
    ]
    try:
        return [rank.wait(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("drops", "alltoall"),
        pytest.param("drops", "two_hop", marks=pytest.mark.slow),
        pytest.param("forgets", "alltoall", marks=pytest.mark.slow),
        pytest.param("forgets", "two_hop", marks=pytest.mark.slow),
        pytest.param("never waits", "alltoall", marks=pytest.mark.slow),
        pytest.param("never waits", "two_hop", marks=pytest.mark.slow),
        pytest.param("late", "alltoall", marks=pytest.mark.slow),
        pytest.param("late", "two_hop", marks=pytest.mark.slow),
    ],
)
def test_a_program_may_end_with_operations_under_way(how, kind, tmp_path):
    assert _leave(how, kind, tmp_path) == [0, 0]


@pytest.mark.parametrize("kind", [pytest.param("alltoall", marks=pytest.mark.slow), "two_hop"])
def test_a_program_that_raises_with_operations_under_way_ends_as_it_would_without(kind, tmp_path):
    assert _leave("raises", kind, tmp_path)[0] == 1


@pytest.mark.parametrize("kind", ["alltoall", pytest.param("two_hop", marks=pytest.mark.slow)])
def test_a_dead_peer_ends_the_wait_with_a_named_error(kind, tmp_path):
    context = multiprocessing.get_context("forkserver")
    messages = context.Queue()
    arguments = (str(tmp_path / "store"), kind, messages)
    ranks = [
        context.Process(target=_exchange_until_a_peer_dies, args=(r, *arguments), daemon=True) for r in (0, 1)
    ]
    for process in ranks:
        process.start()
    try:
        message = messages.get(timeout=30)
        assert "rank 0 of 2: an all-to-all failed" in message and "\n" not in message
    finally:
        for process in ranks:
            process.kill()
