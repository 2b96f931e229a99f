"""Runs a function on several gloo ranks of this machine, in about 0.1 s a rank.

A fork server with torch and DeepSpeed preloaded makes each rank; a file store joins them, so no port
is needed. The function must be importable (module level); what it returns must pickle.
"""

import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

os.environ.setdefault("DS_ACCELERATOR", "cpu")
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preload"])


def _run_rank(fn: Callable, rank: int, world_size: int, store: str, results: Any, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    try:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        results.put((rank, True, fn(rank, world_size, *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
        raise


def run_ranks(
    fn: Callable, world_size: int, *args: Any, timeout_s: float = 120.0, context: Any = FORKED
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank of a fresh gloo world; results in rank order.

    Args:
        context: of multiprocessing.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died or took too long.
    """
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            context.Process(target=_run_rank, args=(fn, rank, world_size, store, results, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _collect(ranks, results, world_size, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()


def run_ranks_on_gpu(fn: Callable, world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """As `run_ranks`, all ranks on the one GPU; gloo joins them still.

    Each is a new interpreter: a forked process cannot use CUDA if its parent has.
    """
    before = os.environ["DS_ACCELERATOR"]
    os.environ["DS_ACCELERATOR"] = "cuda"
    try:
        spawn = multiprocessing.get_context("spawn")
        return run_ranks(fn, world_size, *args, timeout_s=timeout_s, context=spawn)
    finally:
        os.environ["DS_ACCELERATOR"] = before


def run_ranks_once(fn: Callable, world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """As `run_ranks`, in one world for all tests that ask the same; its failure is told to all of them.

    Args must be hashable.
    """
    values = _values_or_failure(fn, world_size, args, timeout_s)
    if isinstance(values, AssertionError):
        raise values
    return values


@cache
def _values_or_failure(
    fn: Callable, world_size: int, args: tuple, timeout_s: float
) -> list[Any] | AssertionError:
    try:
        return run_ranks(fn, world_size, *args, timeout_s=timeout_s)
    except AssertionError as failure:
        return failure


def _collect(ranks: list, results: Any, world_size: int, deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < world_size:
        try:
            rank, fine, value = results.get(timeout=0.2)
        except queue.Empty:
            dead = [r for r, p in enumerate(ranks) if p.exitcode not in (None, 0) and r not in values]
            assert not dead, f"rank {dead[0]} died with exit code {ranks[dead[0]].exitcode}"
            assert time.monotonic() < deadline, f"ranks {sorted(set(range(world_size)) - set(values))} hang"
            continue
        if not fine:
            for process in ranks:
                process.kill()
            raise AssertionError(f"rank {rank} raised:\n{value}")
        values[rank] = value
    return [values[rank] for rank in range(world_size)]
