"""One layout against the plain model: what a rank of the layout tests runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from moe_runtime.build import build_mesh, build_optimizer, build_runtime
from moe_runtime.config.layout import check_layout
from moe_runtime.config.schema import RunConfig
from moe_runtime.model.targets import count_targets
from moe_runtime.model.transformer import Losses
from moe_runtime.optim.schedule import lr_at
from moe_runtime.parallel.executor import StepScalars
from moe_runtime.parallel.expert_load import move_biases
from moe_runtime.parallel.mesh import open_groups
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.train.step import objective_weights, split_microbatches, target_factors
from tests.dist.plain_model import PlainModel, PlainStep, preset_biases

MTP_LAMBDA = 0.3

MODEL = {
    "vocab_size": 48,
    "hidden_size": 24,
    "num_layers": 4,
    "num_dense_layers": 1,
    "ffn_size": 40,
    "num_heads": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_experts": 8,
    "num_groups": 4,
    "num_groups_kept": 2,
    "top_k": 2,
    "expert_ffn_size": 12,
    "mtp_depth": 0,
    "init_std": 0.2,
}
SEQ_LEN = 12


@dataclass(frozen=True)
class Case:
    """A layout and what is special about it.

    Args:
        name: of the case, for messages.
        layout: the layout section.
        microbatches: per lane.
        biases: routing bias of single experts, set before the step.
        device: of all ranks.
        mask: which tokens are no targets: "ragged", "all", or none.
    """

    name: str
    layout: dict
    microbatches: int
    mtp_depth: int = 0
    recompute: bool = False
    biases: dict[int, float] = field(default_factory=dict)
    precision: str = "fp64"
    model: dict = field(default_factory=dict)
    moments: str = "fp32"
    document_separator: int | None = None
    device: str = "cpu"
    mask: str = ""

    def config(self) -> RunConfig:
        dp = self.layout.get("dp", 1)
        return RunConfig.model_validate(
            {
                "model": MODEL | {"mtp_depth": self.mtp_depth} | self.model,
                "layout": self.layout,
                "batch": {"seq_len": SEQ_LEN, "global_batch_size": dp * self.microbatches},
                "recompute": dict.fromkeys(("norm", "swiglu", "mla_up"), self.recompute),
                "recipe": {"balance_alpha": 0.01, "warmup_steps": 0, "mtp_lambda": MTP_LAMBDA},
                "optim": {"moments": self.moments, "eps": 1e-4, "grad_clip": 0.5, "peak_lr": 2e-3},
                "precision": self.precision,
                "data": {"path": "none"},
                "train": {"total_steps": 3},
                "seed": 7,
            }
        )


def build(case: Case, rank: int) -> Runtime:
    """This rank's runtime, biases preset."""
    config = case.config()
    layout = check_layout(config, dist.get_world_size())
    mesh = build_mesh(layout, rank)
    runtime = build_runtime(
        config,
        layout,
        mesh,
        open_groups(mesh),
        torch.device(case.device),
        ranks_per_node=mesh.world_size,
        document_separator=case.document_separator,
    )
    for chunk in runtime.chunks.values():
        preset_biases(chunk, case.biases)
    return runtime


def batch(config: RunConfig, step: int = 0, mask: str = "") -> Tensor:
    """The same random global batch on every rank, [sequences, seq_len + 1 + mtp_depth].

    Under a ragged mask the first sequence has no target, the last one all, and each between fewer than those
    after it.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.batch.global_batch_size, SEQ_LEN + 1 + config.model.mtp_depth)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    if not mask:
        return tokens
    shares = torch.linspace(1.0, 1.0 if mask == "all" else 0.0, shape[0]).unsqueeze(1)
    return torch.where(torch.rand(shape, generator=generator) < shares, ~tokens, tokens)


def held_gradients(case: Case, rank: int) -> tuple[float, dict[str, np.ndarray]]:
    """Gradient norm of a step, and the averaged gradient of every parameter held here."""
    runtime = build(case, rank)
    optimizer = build_optimizer(runtime)
    run_lane(runtime, batch(runtime.config))
    _sum_tied(runtime)
    grads = {name: _averaged(runtime, param).cpu().numpy() for name, param in runtime.named_params}
    return optimizer.reduce(), grads


def run_lane(
    runtime: Runtime, tokens: Tensor, after_backward: Callable[[], None] | None = None
) -> StepScalars:
    """Forward and backward of this lane's part of the global batch."""
    mesh = runtime.mesh
    count = tokens.shape[0] // mesh.dp
    own = tokens[mesh.dp_rank * count : (mesh.dp_rank + 1) * count]
    microbatches = split_microbatches(own.to(runtime.device), 1, 2 if mesh.is_mirrored else 1)
    counts = count_targets(tokens, SEQ_LEN, runtime.config.model.mtp_depth)
    factors = target_factors(counts, tokens.shape[0] * SEQ_LEN) if bool((tokens < 0).any()) else {}
    weights = objective_weights(runtime, count, MTP_LAMBDA, factors)
    return runtime.executor.run(runtime.program(count), microbatches, weights, after_backward)


def compare_gradients(case: Case, rank: int) -> dict[str, float]:
    """Largest relative difference per quantity between this layout and the plain model."""
    runtime = build(case, rank)
    optimizer = build_optimizer(runtime)
    tokens = batch(runtime.config, mask=case.mask)
    scalars = run_lane(runtime, tokens)
    oracle = PlainModel(runtime.config, case.biases, case.document_separator, case.device)
    plain = oracle.forward_backward(tokens.to(case.device), MTP_LAMBDA)
    worst = _compare_losses(scalars, plain.losses, tokens.shape[0])
    _sum_tied(runtime)
    worst |= _compare_parameters(runtime, plain)
    assert torch.equal(_held_counts(runtime, plain), runtime.load.take_total(runtime.groups.data)), "counts"
    worst["norm"] = abs(optimizer.reduce() - plain.norm) / plain.norm
    return worst


def _compare_losses(scalars: StepScalars, found: Losses, sequences: int) -> dict[str, float]:
    wanted = {"loss": found.loss, "loss_mtp": found.loss_mtp, "balance": found.balance}
    names = {name: value.item() for name, value in wanted.items()}
    sums = torch.tensor([scalars.totals.get(name, 0.0) for name in names], dtype=torch.float64)
    dist.all_reduce(sums)
    pairs = zip(names, names.values(), sums / sequences, strict=True)
    return {name: _distance(float(got), want) for name, want, got in pairs if want}


def _distance(got: float, want: float) -> float:
    """Relative; where there is no loss, for nothing is a target, there must be none."""
    return float(not math.isnan(got)) if math.isnan(want) else abs(got - want) / abs(want)


def _compare_parameters(runtime: Runtime, plain: PlainStep) -> dict[str, float]:
    worst = {}
    for name, param in runtime.named_params:
        expected = local_part(runtime, name, plain.grads[name])
        worst[name] = relative(_averaged(runtime, param), expected)
    return worst


def _averaged(runtime: Runtime, param: Parameter) -> Tensor:
    """A parameter's gradient over all ranks that hold it, as a mean over tokens of the batch."""
    is_expert = getattr(param, "is_expert", False)
    grad = param.grad_accum.clone()
    dist.all_reduce(grad, group=runtime.groups.expert_data if is_expert else runtime.groups.data)
    return grad / runtime.mesh.replicas


def _sum_tied(runtime: Runtime) -> None:
    if runtime.tied_embedding is not None and runtime.groups.tied is not None:
        dist.all_reduce(runtime.tied_embedding.grad_accum, group=runtime.groups.tied)


def _held_counts(runtime: Runtime, plain: PlainStep) -> Tensor:
    model = runtime.config.model
    layers = [f"layers.{n}" for n in range(model.num_dense_layers, model.num_layers)]
    layers += [f"mtp.{depth}.block" for depth in range(model.mtp_depth)]
    return plain.losses.counts[[layers.index(name) for name in runtime.load.layers]]


def local_part(runtime: Runtime, name: str, full: Tensor) -> Tensor:
    """The experts of this rank, or the whole tensor."""
    if ".moe.experts." not in name:
        return full
    local = runtime.config.model.num_experts // runtime.mesh.ep
    return full[runtime.mesh.ep_rank * local : (runtime.mesh.ep_rank + 1) * local]


def relative(got: Tensor, expected: Tensor) -> float:
    """max |a - b| / max |b|; what should be zero must be zero."""
    scale = float(expected.abs().max())
    difference = float((got - expected).abs().max())
    return difference / scale if scale else difference


def compare_training(case: Case, rank: int) -> dict[str, float]:
    """Parameters after three ZeRO steps against torch AdamW on FP32 masters; biases exactly."""
    plain = PlainModel(case.config(), case.biases, case.document_separator)
    runtime = train(case, rank, plain)
    for name, moe in plain.model.moe_layers():
        for chunk in runtime.chunks.values():
            for own_name, own in chunk.moe_layers():
                assert own_name != name or torch.equal(own.router.bias, moe.router.bias), f"bias of {name}"
    expected = {name: param.detach() for name, param in plain.model.named_parameters()}
    return {n: relative(p.detach(), local_part(runtime, n, expected[n])) for n, p in runtime.named_params}


def train(case: Case, rank: int, plain: PlainModel | None = None) -> Runtime:
    """Three ZeRO steps, of the plain model too if it is given."""
    runtime = build(case, rank)
    optimizer = build_optimizer(runtime)
    recipe, gamma = runtime.config.recipe, 0.01
    for step in range(3):
        tokens = batch(runtime.config, step)
        lr = lr_at(recipe, runtime.config.optim.peak_lr, step, step * tokens.numel())
        optimizer.zero_grad()
        run_lane(runtime, tokens, optimizer.end_microbatch)
        _sum_tied(runtime)
        total = runtime.load.take_total(runtime.groups.data)
        assert not optimizer.step(lr).skipped
        move_biases(runtime.chunks, runtime.load, total, gamma)
        if plain is not None:
            plain.update(plain.forward_backward(tokens, MTP_LAMBDA), lr, gamma)
    return runtime


def embedding_bytes(case: Case, rank: int) -> bytes | None:
    """The embedding after three steps, if this rank holds one."""
    held = dict(train(case, rank).named_params).get("embed.weight")
    return None if held is None else held.detach().numpy().tobytes()
