"""Turns what every rank saw of a step into one record, with one reduction.

Each number has exactly one owner: sums over microbatches come from the ranks that ran the last stage,
per-layer loads from one holder of each stage, bytes, waits and own work from every rank. So one summed
vector over all ranks carries everything.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_runtime.metrics.balance import expert_balance
from moe_runtime.metrics.record import LAYER_KEYS
from moe_runtime.model.phase import BALANCE, LOSS, LOSS_MTP
from moe_runtime.parallel.executor import StepScalars
from moe_runtime.parallel.runtime import Runtime

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
HEAD = ("loss", "loss_mtp", "loss_balance", "exchange_s", "transfer_s", "flight_s", *TRAFFIC)
PER_LAYER = tuple(LAYER_KEYS)


@dataclass(frozen=True)
class StepFacts:
    """What every rank knows of a step alike."""

    step: int
    tokens: int
    new_tokens: int
    sequences: int
    lr: float
    grad_norm: float
    skipped: bool
    seconds: float
    microbatches: int


def record_step(
    runtime: Runtime, facts: StepFacts, scalars: StepScalars, total: Tensor
) -> tuple[Record, list[float]]:
    """The record of one step, and each rank's own work in seconds; alike on every rank.

    Args:
        scalars: this rank's sums.
        total: int64 [held MoE layers, experts], counts over the global batch.
    """
    layers = all_moe_layers(runtime)
    sizes = [len(HEAD), len(layers) * len(PER_LAYER), runtime.mesh.world_size]
    vector = torch.zeros(sum(sizes), dtype=torch.float64)
    head, flat, work = vector.split(sizes)
    rows = flat.view(len(layers), len(PER_LAYER))
    work[runtime.mesh.rank] = runtime.clock.worked_s
    head.copy_(torch.tensor(_head(runtime, facts, scalars), dtype=torch.float64))
    if runtime.mesh.is_stage_owner:
        for layer, values in _held_layers(runtime, total).items():
            rows[layers.index(layer)] = torch.tensor(values, dtype=torch.float64)
    if runtime.mesh.world_size > 1:
        dist.all_reduce(vector, group=runtime.groups.control)
    by_layer = dict(zip(layers, rows.tolist(), strict=True))
    record = _as_record(runtime, facts, dict(zip(HEAD, head.tolist(), strict=True)), by_layer)
    return record, work.tolist()


def all_moe_layers(runtime: Runtime) -> list[str]:
    """Canonical prefixes of every MoE layer of the model, in order."""
    model = runtime.config.model
    main = [f"layers.{layer}" for layer in range(model.num_dense_layers, model.num_layers)]
    return main + [f"mtp.{depth}.block" for depth in range(model.mtp_depth)]


def _head(runtime: Runtime, facts: StepFacts, scalars: StepScalars) -> list[float]:
    traffic, clock = runtime.dispatcher.traffic.snapshot(), runtime.clock
    depth = max(1, runtime.config.model.mtp_depth)
    means = (
        scalars.totals.get(LOSS, 0.0) / facts.microbatches,
        scalars.totals.get(LOSS_MTP, 0.0) / facts.microbatches / depth,
        scalars.totals.get(BALANCE, 0.0) / facts.microbatches,
    )
    sent = [getattr(traffic, name) for name in TRAFFIC.values()]
    return [*means, clock.exchange_wait_s, clock.transfer_wait_s, clock.exchange_s, *sent]


def _held_layers(runtime: Runtime, total: Tensor) -> dict[str, list[float]]:
    """The numbers of PER_LAYER for each MoE layer that this rank holds."""
    routers = {name: moe.router for chunk in runtime.chunks.values() for name, moe in chunk.moe_layers()}
    held = zip(runtime.load.layers, expert_balance(total), strict=True)
    return {
        layer: [
            balance.load_max,
            balance.load_min,
            balance.violation,
            float(routers[layer].bias.min()),
            float(routers[layer].bias.max()),
        ]
        for layer, balance in held
    }


def _as_record(
    runtime: Runtime, facts: StepFacts, head: dict[str, float], rows: dict[str, list[float]]
) -> Record:
    rank_seconds = facts.seconds * runtime.mesh.world_size
    # On a GPU the host's waits say nothing of the device's, so these are left out there.
    is_timed = runtime.device.type == "cpu"
    is_exchanging = is_timed and runtime.mesh.ep > 1 and head["flight_s"] > 0
    layers = {layer: dict(zip(PER_LAYER, row, strict=True)) for layer, row in rows.items()}
    violations = [values["violation"] for values in layers.values()]
    return {
        "step": facts.step,
        "tokens": facts.tokens,
        "loss": head["loss"],
        "loss_mtp": head["loss_mtp"] if runtime.config.model.mtp_depth else None,
        "loss_balance": head["loss_balance"],
        "grad_norm": facts.grad_norm,
        "lr": facts.lr,
        "batch_size": facts.sequences,
        "skipped": facts.skipped,
        "tokens_per_s": facts.new_tokens / facts.seconds,
        "step_s": facts.seconds,
        "bubble_fraction": head["transfer_s"] / rank_seconds if is_timed else None,
        "exposed_comm_fraction": head["exchange_s"] / rank_seconds if is_timed else None,
        "hidden_comm_fraction": 1 - head["exchange_s"] / head["flight_s"] if is_exchanging else None,
        **{name: int(head[name]) for name in TRAFFIC},
        "max_violation": sum(violations) / len(violations) if violations else None,
        "layers": layers,
    }
