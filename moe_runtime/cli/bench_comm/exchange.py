"""Dispatch and combine of every contender, in turn: what one rank does and measures.

Experts are imitated: expert e multiplies its rows by 1/2 + e / num_experts, so that the combined result
is known in closed form and a row that went astray shows in every contender alike.
"""

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from moe_comm import Placement, open_dispatcher
from torch import Tensor

from moe_runtime.cli.bench_comm.network import LinkCount, count_link
from moe_runtime.cli.bench_comm.peers import PlainExchange, RawExchange, probe_links
from moe_runtime.cli.bench_comm.rank import Line
from moe_runtime.cli.bench_comm.settings import Settings

# |result - expected| / |expected|: BF16 rounds rows and sums (2^-8), FP8 rounds rows (2^-4), at random.
_TOLERANCE = {"bf16": 0.02, "fp8": 0.06}


class Plain:
    """The plain exchange as a contender."""

    def __init__(self, settings: Settings) -> None:
        self._peer = PlainExchange(settings.num_experts)
        self._settings, self._rank = settings, dist.get_rank()
        self._sent = [0, 0]

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        rows, counts = self._peer.dispatch(tokens, weights, expert_ids)
        told = self._settings.local_experts * 8
        self._sent = self._count(self._peer.sent, told, rows)
        return rows, counts

    def combine(self, rows: Tensor) -> Tensor:
        self._sent = self._count(self._peer.received, 0, rows)
        return self._peer.combine(rows)

    def sent_bytes(self) -> list[int]:
        """[within the node, to other nodes] since the last call."""
        sent, self._sent = self._sent, [0, 0]
        return sent

    def _count(self, rows_to: list[int], told: int, rows: Tensor) -> list[int]:
        sent = [0, 0]
        for rank, number in enumerate(rows_to):
            if rank != self._rank:
                is_far = self._settings.node_of(rank) != self._settings.node_of(self._rank)
                sent[is_far] += number * rows.shape[1] * rows.element_size() + told
        return sent


class Raw:
    """The floor as a contender; it knows the sizes before it starts."""

    def __init__(self, settings: Settings, expert_ids: Tensor) -> None:
        self._peer = RawExchange(expert_ids, settings.local_experts)

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, None]:
        return self._peer.dispatch(tokens), None

    def combine(self, rows: Tensor) -> Tensor:
        return self._peer.combine(rows)

    def sent_bytes(self) -> list[int]:
        return [0, 0]


class Ours:
    """One of our dispatchers; its experts apply the gate weights.

    Args:
        name: kind and wire, as in CONTENDERS.
    """

    def __init__(self, name: str, settings: Settings) -> None:
        kind = "two_hop" if name.startswith("two_hop") else "alltoall"
        per_node = settings.ranks_per_node
        groups = settings.num_groups
        placement = Placement(
            settings.num_experts, settings.world_size, dist.get_rank(), per_node, num_groups=groups
        )
        self._dispatcher = open_dispatcher(kind, placement, wire=name.removeprefix(f"{kind}_"))

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> tuple[Tensor, Tensor]:
        received = self._dispatcher.dispatch(tokens, weights, expert_ids).wait()
        self._handle, self.row_weights = received.handle, received.row_weights
        return received.rows, received.row_counts

    def combine(self, rows: Tensor) -> Tensor:
        return self._dispatcher.combine(rows, self._handle).wait()

    def sent_bytes(self) -> list[int]:
        sent = self._dispatcher.traffic.snapshot(reset=True)
        return [sent.all_bytes_intra, sent.all_bytes_inter]


def run_exchange(settings: Settings, folder: Path, line: Line) -> dict[str, Any]:
    """All routings, all contenders, all rounds.

    Args:
        settings: what to measure.
        folder: holds the routings, `NAME.npz`, made by the parent.
        line: to the parent.

    Returns:
        {routing: {contender: [measurement of each round]}, "links": what `probe_links` says}.
    """
    draw = torch.Generator().manual_seed(settings.seed + dist.get_rank())
    tokens = torch.randn(settings.tokens, settings.hidden, generator=draw).to(torch.bfloat16)
    links = None if settings.rate_mbit is None else probe_links(settings, line.barrier)
    contenders = {name: _open(name, settings) for name in settings.contenders if name != "raw"}
    results: dict[str, Any] = {"links": links}
    for routing in settings.routings:
        with np.load(folder / f"{routing}.npz") as arrays:
            expert_ids, weights = (
                torch.from_numpy(arrays[key][dist.get_rank()]) for key in ("expert_ids", "weights")
            )
        case = _Case(settings, tokens, weights, expert_ids, line)
        here: dict[str, Any] = dict(contenders)
        if "raw" in settings.contenders:
            here["raw"] = Raw(settings, expert_ids)
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in here}
        for turn in range(case.rounds(routing)):
            for name in here if turn % 2 == 0 else reversed(here):
                times[name].append(case.measure(name, here[name]))
        results[routing] = times
    return results


def _open(name: str, settings: Settings) -> Plain | Ours:
    return Plain(settings) if name == "plain" else Ours(name, settings)


class _Case:
    """One routing of one rank, measured."""

    def __init__(
        self, settings: Settings, tokens: Tensor, weights: Tensor, expert_ids: Tensor, line: Line
    ) -> None:
        self._settings, self._line = settings, line
        self._inputs = (tokens, weights, expert_ids)
        factor = (weights * (0.5 + expert_ids / settings.num_experts)).sum(1, keepdim=True)
        self._expected = tokens.float() * factor

    def rounds(self, routing: str) -> int:
        """How often each contender is measured; one warms up first where rounds are short."""
        if self._settings.rate_mbit is None:
            return self._settings.rounds + 1
        return 1 if routing == "adversarial" else self._settings.rounds

    def measure(self, name: str, contender: Any) -> dict[str, Any]:
        """One dispatch and one combine: seconds, bytes, link counts, processor seconds."""
        dispatched = self._phase(contender, lambda: contender.dispatch(*self._inputs))
        rows, counts = dispatched.pop("value")
        if counts is not None:
            rows = self._apply_experts(rows, counts, getattr(contender, "row_weights", None))
        combined = self._phase(contender, lambda: contender.combine(rows))
        result = combined.pop("value")
        error = 0.0 if counts is None else self._error(result)
        limit = _TOLERANCE["fp8" if "fp8" in name else "bf16"]
        assert error < limit, f"{name}: the combined tokens are {error:.3f} off, expected less than {limit}"
        return {"dispatch": dispatched, "combine": combined, "error": error, "rows": rows.shape[0]}

    def _phase(self, contender: Any, run: Callable[[], Any]) -> dict[str, Any]:
        before = self._links()
        self._line.barrier()
        if self._settings.rate_mbit is None:
            dist.barrier()
        processor, start = processor_s(), time.perf_counter()
        value = run()
        seconds, processor = time.perf_counter() - start, processor_s() - processor
        self._line.barrier()
        crossed = None if before is None else vars(count_link() - before)
        self._line.barrier()
        sent = contender.sent_bytes()
        return {"value": value, "s": seconds, "cpu_s": processor, "sent": sent, "link": crossed}

    def _links(self) -> LinkCount | None:
        return count_link() if self._settings.rate_mbit is not None else None

    def _apply_experts(self, rows: Tensor, counts: Tensor, row_weights: Tensor | None) -> Tensor:
        first = dist.get_rank() * self._settings.local_experts
        experts = torch.arange(first, first + self._settings.local_experts)
        factor = (0.5 + experts / self._settings.num_experts).repeat_interleave(counts)
        if row_weights is not None:
            factor = factor * row_weights
        return (rows * factor.unsqueeze(1)).to(rows.dtype)

    def _error(self, result: Tensor) -> float:
        return float((result.float() - self._expected).norm() / self._expected.norm())


def processor_s() -> float:
    """Seconds of processor time of this process, all threads, system calls included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
