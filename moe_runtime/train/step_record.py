"""Turns what every rank saw of a step into one record, with one reduction.

Each number has exactly one owner: sums over microbatches come from the ranks that ran the last stage,
per-layer loads from one holder of each stage, bytes, waits and own work from every rank. So one summed
vector over all ranks carries everything (`meters/one_sum.py`), and the record is the same on every rank:
whatever is decided by it is decided alike.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_runtime.metrics.heatmap import is_due
from moe_runtime.metrics.memory import alloc_retries, peak_bytes
from moe_runtime.metrics.utilisation import peak_flops
from moe_runtime.metrics.window import TimeWindow
from moe_runtime.model.phase import BALANCE, LOSS, LOSS_MTP
from moe_runtime.optim.schedule import bias_gamma_at
from moe_runtime.parallel.executor import StepScalars
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.planner.flops import token_flops
from moe_runtime.schedule.action import Program
from moe_runtime.train.meters.ideal_bubble import IdealBubble
from moe_runtime.train.meters.one_sum import OneSum
from moe_runtime.train.meters.routing import RoutingMeter, detail, summary

Record = dict[str, Any]

TRAFFIC = {  # metric: attribute of the dispatcher's counters
    "comm_bytes_inter": "all_bytes_inter",
    "comm_bytes_intra": "all_bytes_intra",
    "comm_meta_bytes_inter": "meta_bytes_inter",
    "comm_meta_bytes_intra": "meta_bytes_intra",
    "comm_rows_inter": "rows_inter",
    "comm_rows_intra": "rows_intra",
    "comm_rows_self": "rows_self",
}
_HEAD = ("loss", "loss_mtp", "loss_balance", "exchange_s", "transfer_s", "flight_s", *TRAFFIC)
_OF_A_RANK = ("worked_s", "step_s", "data_s", "meters_s", "peak_bytes", "alloc_retries")
_GIGA = 1e9


@dataclass(frozen=True)
class StepFacts:
    """What a rank knows of a step; but for `seconds` and `data_s`, which are its own, all know it alike.

    Args:
        seconds: from the step's begin to the end of its update.
        data_s: of that, reading tokens.
    """

    step: int
    tokens: int
    new_tokens: int
    sequences: int
    lr: float
    grad_norm: float
    skipped: bool
    seconds: float
    data_s: float
    microbatches: int


class StepRecorder:
    """Makes the records of a run's steps; made and called on every rank alike.

    Args:
        runtime: of this rank.

    Attributes:
        work_s: own work of each rank in the newest step, seconds.
        expert_load: of the newest step, FP64 [MoE layers, experts] relative to a fair share; None unless it
            is due in expert_load.jsonl.
    """

    def __init__(self, runtime: Runtime) -> None:
        config = runtime.config
        self._runtime, self._config = runtime, config.metrics
        self._routing = RoutingMeter(runtime)
        self._bubble = IdealBubble(config.metrics.window)
        self._times = TimeWindow(config.metrics.window)
        self._flops = token_flops(config.model, config.batch.seq_len).total
        self._peak = peak_flops(runtime.device, config.metrics.peak_tflops)
        # On a GPU the host's waits say nothing of the device's, so these are left out there.
        self._is_timed = runtime.device.type == "cpu"
        self._newest: int | None = None
        self.work_s: list[float] = []
        self.expert_load: Tensor | None = None

    def __call__(self, facts: StepFacts, scalars: StepScalars, total: Tensor, program: Program) -> Record:
        """The record of one step; a collective call, alike on every rank.

        Args:
            scalars: this rank's sums.
            total: int64 [held MoE layers, experts], counts over the global batch.
            program: what ran.
        """
        clock, world_size = self._runtime.clock, self._runtime.mesh.world_size
        with clock.metering():
            if self._newest is not None and facts.step != self._newest + 1:
                self._routing.forget()  # after a roll-back
            self._newest = facts.step
            tables = OneSum(self._shapes(facts.step, program))
            self._fill(tables, facts, scalars, total)
        own = tables["ranks"][self._runtime.mesh.rank]
        own[_OF_A_RANK.index("meters_s")] = self._take_meters_s()
        tables.add_up(self._runtime.groups.control if world_size > 1 else None)
        with clock.metering():
            return self._read(tables, facts)

    def starved_experts(self, limit: float) -> dict[str, list[int]]:
        """Experts that are without tokens, and their bias no help, for more than `limit` steps, by layer.

        Of the layers that this rank tells of.
        """
        rows = zip(self._runtime.load.layers, self._routing.starved > limit, strict=True)
        return {layer: row.nonzero().flatten().tolist() for layer, row in rows if bool(row.any())}

    def _take_meters_s(self) -> float:
        """What measuring took this rank since the last record, wherever it was done."""
        runtime = self._runtime
        within = runtime.meters.take_seconds() + runtime.fp8_watch.take_seconds()
        return within + runtime.clock.take_meters_s()

    def _shapes(self, step: int, program: Program) -> dict[str, tuple[int, ...]]:
        has_pipeline = self._is_timed and self._runtime.mesh.pp > 1
        return {
            "head": (len(_HEAD),),
            "ranks": (self._runtime.mesh.world_size, len(_OF_A_RANK)),
            **self._routing.shapes(with_load=is_due(step, self._config.heatmap_every)),
            **(self._bubble.shapes(program, step) if has_pipeline else {}),
        }

    def _fill(self, tables: OneSum, facts: StepFacts, scalars: StepScalars, total: Tensor) -> None:
        runtime, clock = self._runtime, self._runtime.clock
        traffic, depth = runtime.dispatcher.traffic.snapshot(), max(1, runtime.config.model.mtp_depth)
        head = (
            scalars.totals.get(LOSS, 0.0) / facts.microbatches,
            scalars.totals.get(LOSS_MTP, 0.0) / facts.microbatches / depth,
            scalars.totals.get(BALANCE, 0.0) / facts.microbatches,
            clock.exchange_wait_s,
            clock.transfer_wait_s,
            clock.exchange_s,
            *(getattr(traffic, name) for name in TRAFFIC.values()),
        )
        device = runtime.device
        held = (peak_bytes(device), alloc_retries(device))
        own = (clock.worked_s, facts.seconds, facts.data_s, 0.0, *held)
        _put(tables["head"], head)
        _put(tables["ranks"][runtime.mesh.rank], own)
        gamma = bias_gamma_at(runtime.config.recipe, facts.tokens - facts.new_tokens)
        self._routing.fill(tables, total, is_moving=gamma > 0.0)
        self._bubble.fill(tables, clock)

    def _read(self, tables: OneSum, facts: StepFacts) -> Record:
        head = dict(zip(_HEAD, tables["head"].tolist(), strict=True))
        ranks = dict(zip(_OF_A_RANK, tables["ranks"].T.tolist(), strict=True))
        self.work_s = ranks["worked_s"]
        self.expert_load = tables.get("load")
        layers = self._routing.read(tables, facts.new_tokens)
        every = self._config.layers_every
        return {
            **self._learning(facts, head),
            **self._speed(facts.new_tokens, ranks),
            **self._waits(tables, head, ranks["step_s"][0]),
            **{name: int(head[name]) for name in TRAFFIC},
            **summary(layers),
            "layers": detail(layers) if every and facts.step % every == 0 else None,
        }

    def _learning(self, facts: StepFacts, head: dict[str, float]) -> Record:
        return {
            "step": facts.step,
            "tokens": facts.tokens,
            "loss": head["loss"],
            "loss_mtp": head["loss_mtp"] if self._runtime.config.model.mtp_depth else None,
            "loss_balance": head["loss_balance"],
            "grad_norm": facts.grad_norm,
            "lr": facts.lr,
            "batch_size": facts.sequences,
            "skipped": facts.skipped,
        }

    def _speed(self, new_tokens: int, ranks: dict[str, list[float]]) -> Record:
        """Times are those of rank 0 where ranks have their own, so that all ranks hold one record."""
        step_s, is_gpu = ranks["step_s"][0], self._runtime.device.type == "cuda"
        rate = new_tokens / step_s
        of_a_rank = rate / self._runtime.mesh.world_size
        if not self._runtime.clock.progress.is_first_step:
            self._times.add(step_s)
        return {
            "tokens_per_s": rate,
            "tokens_per_s_rank": of_a_rank,
            "step_s": step_s,
            "step_s_p50": self._times.p50,
            "step_s_p99": self._times.p99,
            "flops_per_token": self._flops,
            "mfu": None if self._peak is None else self._flops * of_a_rank / self._peak,
            "data_wait_s": max(ranks["data_s"]),
            "meters_s": max(ranks["meters_s"]),
            "memory_peak_gb": max(ranks["peak_bytes"]) / _GIGA,
            "alloc_retries": int(sum(ranks["alloc_retries"])) if is_gpu else None,
        }

    def _waits(self, tables: OneSum, head: dict[str, float], step_s: float) -> Record:
        """What ranks wait for, and what flies meanwhile; nothing where the host's clock does not tell."""
        if not self._is_timed:
            return {}
        world_size = self._runtime.mesh.world_size
        rank_seconds = step_s * world_size
        self._bubble.read(tables, step_s)
        waits = {
            "bubble_fraction": head["transfer_s"] / rank_seconds,
            "bubble_fraction_ideal": self._bubble.fraction if self._runtime.mesh.pp > 1 else 0.0,
            "exposed_comm_fraction": head["exchange_s"] / rank_seconds,
            "exposed_comm_s": head["exchange_s"] / world_size,
        }
        if self._runtime.mesh.ep == 1 or head["flight_s"] <= 0:
            return waits
        rates = {
            f"dispatch_gb_s_{link}": head[f"comm_bytes_{link}"] / head["flight_s"] / _GIGA
            for link in ("inter", "intra")
            if head[f"comm_bytes_{link}"]
        }
        return {**waits, "hidden_comm_fraction": 1 - head["exchange_s"] / head["flight_s"], **rates}


def _put(table: Tensor, values: tuple[float, ...]) -> None:
    table.copy_(table.new_tensor(values))
