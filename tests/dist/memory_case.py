"""What every rank of a gloo world runs to measure its memory by kind, beside what the planner reckons.

States are read off the objects that hold them. Activations are all storages alive between two entries of the
program, casts of weights and boundary tensors apart; buffers of exchanges are those that records are packed into
and arrive in.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
from moe_comm.record import RecordLayout
from torch import Tensor

from moe_runtime.build import build_mesh, build_optimizer, build_runtime
from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.fp8.cpu_units import cpu_multiplies_bf16
from moe_runtime.optim.moments import STEP
from moe_runtime.parallel.mesh import open_groups
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.planner.reckon.buffers import boundary_bytes, dispatcher_bytes
from moe_runtime.planner.reckon.kept import CPU, Keeping
from moe_runtime.planner.reckon.live import fullest
from moe_runtime.planner.reckon.memory import rank_memory, run_shape, stage_live
from moe_runtime.train.step import objective_weights, split_microbatches
from tests.dist.live_bytes import LiveBytes

# Proportions of DeepSeek-V3 at a narrow width; wide enough that indices and single numbers are a small share.
MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 256,
    "num_layers": 4,
    "num_dense_layers": 1,
    "ffn_size": 640,
    "num_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_experts": 8,
    "num_groups": 4,
    "num_groups_kept": 2,
    "top_k": 2,
    "expert_ffn_size": 128,
    "mtp_depth": 0,
    "init_std": 0.02,
}
SEQ_LEN = 128
ALL = {"norm": True, "swiglu": True, "mla_up": True}


@dataclass(frozen=True)
class Case:
    """One run.

    Args:
        microbatches: of a lane.
    """

    precision: str = "bf16"
    moments: str = "bf16"
    layout: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    recompute: dict[str, bool] = field(default_factory=dict)
    microbatches: int = 2

    @property
    def world_size(self) -> int:
        return self.layout.get("pp", 1) * self.layout.get("dp", 1)

    @property
    def exchanges_may_meet(self) -> bool:
        """Two at a time, or two hops of one."""
        return self.layout.get("schedule") == "dualpipe" or self.layout.get("dispatcher") == "two_hop"

    def config(self) -> RunConfig:
        sequences = self.microbatches * self.layout.get("dp", 1)
        return RunConfig.model_validate(
            {
                "model": MODEL | self.model,
                "layout": self.layout,
                "batch": {"seq_len": SEQ_LEN, "global_batch_size": sequences},
                "recompute": self.recompute,
                "optim": {"moments": self.moments},
                "precision": self.precision,
                "device": "cpu",
                "data": {"path": "none"},
                "train": {"total_steps": 2},
            }
        )


DENSE = {"num_dense_layers": 4}
CASES = {
    "dense, BF16": Case(model=DENSE, moments="fp32"),
    "dense, FP8, recompute": Case(model=DENSE, precision="fp8", moments="fp8", recompute=ALL),
    "MoE and MTP, BF16": Case(model={"mtp_depth": 1}),
    "MoE and MTP, FP8": Case(model={"mtp_depth": 1}, precision="fp8", moments="fp8"),
    "1f1b, MTP, recompute": Case(
        model={"mtp_depth": 1}, layout={"pp": 2, "schedule": "1f1b"}, recompute=ALL, microbatches=4
    ),
    "zb1p, BF16": Case(layout={"pp": 2, "schedule": "zb1p"}, microbatches=4),
    "zb1p, FP8, recompute": Case(
        layout={"pp": 2, "schedule": "zb1p"}, precision="fp8", recompute=ALL, microbatches=4
    ),
    "dualpipe, FP8": Case(
        layout={"pp": 2, "schedule": "dualpipe"}, precision="fp8", moments="fp8", microbatches=4
    ),
    "ep 2, BF16": Case(layout={"dp": 2, "ep": 2}, moments="fp32"),
    "two hops, BF16": Case(layout={"dp": 4, "ep": 4, "ranks_per_node": 2, "dispatcher": "two_hop"}),
    "dualpipe, ep 2, FP8, recompute": Case(
        layout={"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"},
        precision="fp8",
        recompute=ALL,
        microbatches=4,
    ),
}


@dataclass(frozen=True)
class Compared:
    """Bytes by kind of one rank."""

    measured: dict[str, float]
    reckoned: dict[str, float]

    def errors(self) -> dict[str, float]:
        """Reckoned over measured, less one, of kinds that are there."""
        found = {}
        for kind, size in self.measured.items():
            if size or self.reckoned[kind]:
                found[kind] = self.reckoned[kind] / size - 1 if size else float("inf")
        return found


def compare(rank: int, world_size: int, case: Case) -> Compared:
    """Train two steps; measure the second."""
    config = case.config()
    layout = check_layout(config, world_size)
    mesh = build_mesh(layout, rank)
    cpu = torch.device("cpu")
    runtime = build_runtime(config, layout, mesh, open_groups(mesh), cpu, ranks_per_node=world_size)
    optimizer = build_optimizer(runtime)
    _train_step(runtime, optimizer, case)
    watch = _Watch(runtime)
    rows = _train_step(runtime, optimizer, case, watch)
    measured = _states(runtime, optimizer) | watch.peaks
    sent = SEQ_LEN * config.model.top_k
    imbalance = rows / sent if rows else 1.0
    memory = rank_memory(config, layout, watch.program, mesh.pp_rank, imbalance, 0.0, _this_cpu())
    shape = run_shape(config, layout, imbalance)
    fullest_layer = replace(shape, rows=max(watch.rows, default=0))
    received = fullest(watch.program, mesh.pp_rank, stage_live(config, layout, shape, _this_cpu())).received
    reckoned = memory.by_kind() | {
        "activations": memory.between_entries,
        "running": memory.running + memory.weight_casts,
        "exchanges": dispatcher_bytes(config, layout, watch.program, mesh.pp_rank, fullest_layer),
        "received": boundary_bytes(config, received, shape),
        "at_update": memory.at_update,
    }
    return Compared(measured, {kind: reckoned[kind] for kind in measured})


def _this_cpu() -> Keeping:
    return CPU if cpu_multiplies_bf16() else replace(CPU, attention_bytes=4, gradient_bytes=4)


def _train_step(
    runtime: Runtime, optimizer: ZeroOptimizer, case: Case, watch: "_Watch | None" = None
) -> float:
    """One step; with `watch` its memory, and rows that arrived a microbatch and MoE layer."""
    config, mesh = runtime.config, runtime.mesh
    generator = torch.Generator().manual_seed(mesh.dp_rank)
    length = SEQ_LEN + 1 + config.model.mtp_depth
    tokens = torch.randint(config.model.vocab_size, (case.microbatches, length), generator=generator)
    weights = objective_weights(runtime, case.microbatches, 0.3)
    microbatches = split_microbatches(tokens, 1, 2 if mesh.is_mirrored else 1)
    program = runtime.program(case.microbatches)
    optimizer.zero_grad()
    if watch is None:
        runtime.executor.run(program, microbatches, weights, optimizer.end_microbatch)
    else:
        watch.run(program, microbatches, weights, tokens)
        watch.update(optimizer)
        return watch.mean_rows()
    optimizer.step(1e-3)
    return 0.0


def _states(runtime: Runtime, optimizer: ZeroOptimizer) -> dict[str, float]:
    params = [param for _, param in runtime.named_params]
    buffers = [buffer for chunk in runtime.chunks.values() for buffer in chunk.buffers()]
    masters = [partition.master for partition in optimizer.partitions()]
    moments = [
        value
        for master in masters
        for name, value in optimizer.client.state[master].items()
        if name != STEP
    ]
    gradients = [param.grad_accum for param in params]
    return {
        "weights": _nbytes([*params, *buffers]),
        "gradients": _nbytes(gradients),
        "masters": _nbytes(masters),
        "moments": _nbytes(moments),
    }


def _nbytes(tensors: Iterable[Tensor]) -> float:
    """Of their storages, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return float(sum(storages.values()))


class _Watch:
    """Looks at a rank between the entries of its program."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.peaks = dict.fromkeys(("activations", "weight_casts", "received"), 0.0)
        self.program: Any = None
        self.rows: list[int] = []
        self._leaving: dict[int, tuple[weakref.ref, int]] = {}

    def run(self, program: Any, microbatches: Any, weights: Any, tokens: Tensor) -> None:
        """The program, watched."""
        self.program, executor = program, self.runtime.executor
        clock, buffers = self.runtime.clock, LiveBytes()
        tables = [
            table
            for chunk in self.runtime.chunks.values()
            for block in chunk.blocks()
            for table in block.attn.rotary._tables.values()
        ]
        params = [param for _, param in self.runtime.named_params]
        modules = [buffer for chunk in self.runtime.chunks.values() for buffer in chunk.buffers()]
        ignored = [*params, *(p.grad_accum for p in params), *modules, *tables, tokens]
        meter, enters, send = LiveBytes(ignored), clock.progress.runs, executor._departures.add
        allocate = RecordLayout.allocate
        hooks = [
            moe.experts.register_forward_pre_hook(lambda _, given: self.rows.append(given[0].shape[0]))
            for chunk in self.runtime.chunks.values()
            for _, moe in chunk.moe_layers()
        ]

        def entered(entry: str) -> None:
            self._look(meter, buffers)
            enters(entry)

        def added(name: str, transfer: Any, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            self._leaving[storage._cdata] = (weakref.ref(storage), storage.nbytes())
            send(name, transfer, tensor)

        def allocated(*args: Any) -> Tensor:
            made = allocate(*args)
            buffers.see(made)
            return made

        with (
            patch.object(clock.progress, "runs", entered),
            patch.object(executor._departures, "add", added),
            patch.object(RecordLayout, "allocate", allocated),
            meter,
        ):
            executor.run(program, microbatches, weights)
        for hook in hooks:
            hook.remove()
        self.peaks |= {"running": float(meter.peak), "exchanges": float(buffers.peak)}

    def update(self, optimizer: ZeroOptimizer) -> None:
        """Reduction and update, watched."""
        params = [param for _, param in self.runtime.named_params]
        masters = [partition.master for partition in optimizer.partitions()]
        moments = [value for master in masters for value in optimizer.client.state[master].values()]
        gradients = [param.grad_accum for param in params]
        casts = self.runtime.weight_casts.tensors()
        with LiveBytes([*params, *masters, *moments, *gradients, *casts]) as meter:
            optimizer.step(1e-3)
        self.peaks["at_update"] = float(meter.peak)

    def mean_rows(self) -> float:
        """Rows that arrived, a microbatch and MoE layer; 0 without such layers."""
        return sum(self.rows) / max(len(self.rows), 1)

    def _look(self, meter: LiveBytes, buffers: LiveBytes) -> None:
        executor = self.runtime.executor
        posted = [buffer for _, buffer in executor._arriving.values()]
        boundary = [*posted, *executor._outputs.values(), *executor._input_grads.values()]
        sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in boundary}
        sizes |= {key: size for key, (alive, size) in self._leaving.items() if alive() is not None}
        casts = float(self.runtime.weight_casts.nbytes)
        found = {
            "activations": float(meter.now - sum(sizes.values()) - buffers.now) - casts,
            "weight_casts": casts,
            "received": _nbytes(posted),
        }
        self.peaks = {kind: max(self.peaks[kind], size) for kind, size in found.items()}
