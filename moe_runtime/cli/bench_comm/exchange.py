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
from torch import Tensor

from moe_runtime.cli.bench_comm.contenders import Contender, Raw, open_contender
from moe_runtime.cli.bench_comm.peers import probe_links
from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.testbed.line import Line
from moe_runtime.cli.testbed.links import LinkCount, count_link

# |result - expected| / |expected|: BF16 rounds rows and sums (2^-8), FP8 rounds rows (2^-4), at random.
_TOLERANCE = {"bf16": 0.02, "fp8": 0.06}


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
    opened = {name: open_contender(name, settings) for name in settings.contenders if name != "raw"}
    results: dict[str, Any] = {"links": links}
    for routing in settings.routings:
        with np.load(folder / f"{routing}.npz") as arrays:
            expert_ids, weights = (
                torch.from_numpy(arrays[key][dist.get_rank()]) for key in ("expert_ids", "weights")
            )
        case = _Case(settings, tokens, weights, expert_ids, line)
        contenders = dict(opened)
        if "raw" in settings.contenders:
            contenders["raw"] = Raw(settings, expert_ids)
        times: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        for turn in range(case.rounds(routing)):
            for name in contenders if turn % 2 == 0 else reversed(contenders):
                times[name].append(case.measure(name, contenders[name]))
        results[routing] = times
    return results


class _Case:
    """One routing of one rank, measured."""

    def __init__(
        self, settings: Settings, tokens: Tensor, weights: Tensor, expert_ids: Tensor, line: Line
    ) -> None:
        self._settings, self._line = settings, line
        self._inputs = (tokens, weights, expert_ids)
        factors = 0.5 + torch.arange(settings.num_experts) / settings.num_experts
        first = dist.get_rank() * settings.local_experts
        self._factors = factors[first : first + settings.local_experts]
        self._expected = tokens.float() * (weights * factors[expert_ids]).sum(1, keepdim=True)

    def rounds(self, routing: str) -> int:
        """How often each contender is measured; one warms up first where rounds are short."""
        if self._settings.rate_mbit is None:
            return self._settings.rounds + 1
        return 1 if routing == "adversarial" else self._settings.rounds

    def measure(self, name: str, contender: Contender) -> dict[str, Any]:
        """One dispatch and one combine: seconds, bytes, link counts, processor seconds."""
        dispatched = self._phase(contender, lambda: contender.dispatch(*self._inputs))
        rows = contender.apply_experts(dispatched.pop("value"), self._factors)
        combined = self._phase(contender, lambda: contender.combine(rows))
        result = combined.pop("value")
        error = self._error(result) if contender.sums else 0.0
        limit = _TOLERANCE["fp8" if "fp8" in name else "bf16"]
        assert error < limit, f"{name}: the combined tokens are {error:.3f} off, expected less than {limit}"
        return {"dispatch": dispatched, "combine": combined, "error": error}

    def _phase(self, contender: Contender, run: Callable[[], Any]) -> dict[str, Any]:
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

    def _error(self, result: Tensor) -> float:
        return float((result.float() - self._expected).norm() / self._expected.norm())


def processor_s() -> float:
    """Seconds of processor time of this process, all threads, system calls included."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
