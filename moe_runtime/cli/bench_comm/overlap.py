"""Computation under communication: does a started dispatch or combine fly while this rank computes?

Alone, the exchange takes c; matrix products are repeated until they take c too; then the exchange is
started, the products run, and the exchange is waited for. Perfect overlap takes c, none 2c.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from moe_comm import Placement, open_dispatcher
from torch import Tensor

from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.testbed.line import Line

_SIDE = 512


class _Products:
    """Matrix products, as many as take a given time."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self._left, self._right = (torch.randn(_SIDE, _SIDE, generator=draw) for _ in range(2))
        self._out = torch.empty(_SIDE, _SIDE)
        self._repeats = 20
        self.run()

    def fit(self, seconds: float) -> None:
        """From now on repeat as often as fits these seconds."""
        taken = _timed(self.run)
        self._repeats = max(1, round(self._repeats * seconds / taken))

    def run(self) -> None:
        """Compute."""
        for _ in range(self._repeats):
            torch.mm(self._left, self._right, out=self._out)


def run_overlap(settings: Settings, folder: Path, line: Line) -> dict[str, Any]:
    """Dispatch and combine of every contender of ours, balanced routing.

    Returns:
        {contender: {"dispatch", "combine": [{"exchange", "compute", "pair": seconds}]}}.
    """
    rank = dist.get_rank()
    with np.load(folder / f"{settings.routings[0]}.npz") as arrays:
        expert_ids, weights = (torch.from_numpy(arrays[key][rank]) for key in ("expert_ids", "weights"))
    tokens = torch.randn(settings.tokens, settings.hidden).to(torch.bfloat16)
    results: dict[str, Any] = {}
    for name in settings.contenders:
        kind = "two_hop" if name.startswith("two_hop") else "alltoall"
        placement = Placement(
            settings.num_experts,
            settings.world_size,
            rank,
            settings.ranks_per_node,
            num_groups=settings.num_groups,
        )
        dispatcher = open_dispatcher(kind, placement, wire=name.removeprefix(f"{kind}_"))
        received = dispatcher.dispatch(tokens, weights, expert_ids).wait()

        def dispatch(by: Any = dispatcher) -> Any:
            return by.dispatch(tokens, weights, expert_ids)

        def combine(by: Any = dispatcher, rows: Tensor = received.rows, handle: Any = received.handle) -> Any:
            return by.combine(rows, handle)

        results[name] = {
            "dispatch": _race(dispatch, settings.rounds, line),
            "combine": _race(combine, settings.rounds, line),
        }
    return results


def _race(start: Callable[[], Any], rounds: int, line: Line) -> list[dict[str, float]]:
    """Exchange alone, products alone, both; several times in turn."""
    products = _Products()

    def exchange() -> None:
        start().wait()

    def pair() -> None:
        pending = start()
        products.run()
        pending.wait()

    measured = []
    for _ in range(rounds + 1):
        turn = {}
        line.barrier()
        turn["exchange"] = _slowest(_timed(exchange))
        products.fit(turn["exchange"])
        for name, run in (("compute", products.run), ("pair", pair)):
            line.barrier()
            turn[name] = _timed(run)
        measured.append(turn)
    return measured[1:]  # the first warms up


def _slowest(seconds: float) -> float:
    """The largest of all ranks' times."""
    longest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    return float(longest)


def _timed(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
