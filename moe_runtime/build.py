"""The only place that turns a RunConfig into objects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from moe_comm.dispatcher import Dispatcher
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from torch.nn import Parameter

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.model.phase import Compute, Phase
from moe_runtime.model.transformer import Transformer
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.groups import parameter_groups
from moe_runtime.parallel.executor import Executor
from moe_runtime.parallel.expert_load import ExpertLoad
from moe_runtime.parallel.mesh import Groups, Mesh
from moe_runtime.parallel.p2p import TorchTransport, Transport
from moe_runtime.parallel.stage import Clock, StageRunner
from moe_runtime.parallel.weight_grad import WeightGradSink
from moe_runtime.parallel.zero import ZeroOptimizer
from moe_runtime.schedule.action import Program
from moe_runtime.schedule.builders import build
from moe_runtime.schedule.passes import lower

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass
class Runtime:
    """Everything of one rank that a training step touches.

    Args:
        chunks: stage -> module, in ascending stage order.
        named_params: canonical name -> parameter, each object once, in ascending stage order.
        tied_embedding: the embedding that first and last stage hold a copy of each, or None.
        executor: runs training and validation programs.
        sampler: runs forwards that end with the normed stream, before head and MTP.
    """

    config: RunConfig
    layout: ResolvedLayout
    mesh: Mesh
    groups: Groups
    device: torch.device
    chunks: dict[int, Transformer]
    named_params: list[tuple[str, Parameter]]
    tied_embedding: Parameter | None
    sink: WeightGradSink
    load: ExpertLoad
    clock: Clock
    dispatcher: Dispatcher
    executor: Executor
    sampler: Executor

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """`placement[direction][stage]` is the pipeline rank that holds the stage."""
        stages = tuple(range(self.mesh.pp))
        return (stages, stages[::-1]) if self.mesh.is_mirrored else (stages,)

    def program(self, num_microbatches: int) -> Program:
        """This run's schedule for a number of microbatches a lane, checked, with transfers."""
        return lower(build(self.layout.schedule, self.mesh.pp, num_microbatches))


def build_mesh(layout: ResolvedLayout, rank: int) -> Mesh:
    """The coordinates of one rank."""
    return Mesh(layout.pp, layout.dp, layout.ep, layout.schedule == "dualpipe", rank)


def build_runtime(
    config: RunConfig,
    layout: ResolvedLayout,
    mesh: Mesh,
    groups: Groups,
    device: torch.device,
    *,
    ranks_per_node: int,
    document_separator: int | None = None,
    transport: Transport | None = None,
) -> Runtime:
    """Build this rank's part of the model and what runs it.

    Args:
        ranks_per_node: processes on each machine, for the traffic counters.
        document_separator: token after which attention starts anew; None attends over everything.
        transport: between pipeline ranks; None takes torch.distributed.
    """
    dispatcher = _build_dispatcher(config, layout, mesh, groups, ranks_per_node)
    held = sorted({stage for _, stage in _placement(layout, mesh)})
    chunks = {
        stage: build_chunk(config, layout, mesh, stage, dispatcher, device, document_separator)
        for stage in held
    }
    tied = _tie_embedding(config, layout, chunks)
    named = _unique_parameters(chunks)
    sink = WeightGradSink()
    sink.install(param for _, param in named)
    layers = [name for chunk in chunks.values() for name, _ in chunk.moe_layers()]
    load, clock = ExpertLoad(layers, config.model.num_experts, device), Clock()
    if transport is None and mesh.pp > 1:
        transport = _torch_transport(mesh, groups)

    def open_executor(phases_of: Callable[[Transformer], Sequence[Phase]]) -> Executor:
        runners = {
            stage: StageRunner(phases_of(chunk), dispatcher, sink, load.add, clock)
            for stage, chunk in chunks.items()
        }
        return Executor(
            mesh.pp_rank,
            {(direction, stage): runners[stage] for direction, stage in _placement(layout, mesh)},
            transport,
            boundary_dtype=DTYPES[config.precision],
            hidden_size=config.model.hidden_size,
            device=device,
            clock=clock,
            needs_tokens=document_separator is not None,
            extra_tokens=1 + config.model.mtp_depth,
        )

    executor = open_executor(lambda chunk: chunk.phases())
    sampler = open_executor(lambda chunk: _until_head(chunk.phases()))
    return Runtime(
        config,
        layout,
        mesh,
        groups,
        device,
        chunks,
        named,
        tied,
        sink,
        load,
        clock,
        dispatcher,
        executor,
        sampler,
    )


def build_chunk(
    config: RunConfig,
    layout: ResolvedLayout,
    mesh: Mesh,
    stage: int,
    dispatcher: Dispatcher,
    device: torch.device,
    document_separator: int | None,
) -> Transformer:
    """One stage of the model with the experts of this rank, initialised alike in every layout."""
    local_experts = config.model.num_experts // mesh.ep
    chunk = Transformer(
        config.model,
        layers=layout.layers[stage],
        has_embedding=stage == 0,
        has_head=stage == layout.pp - 1,
        num_local_experts=local_experts,
        first_expert=mesh.ep_rank * local_experts,
        recompute=config.recompute,
        dtype=DTYPES[config.precision],
        device=device,
        document_separator=document_separator,
        dispatcher=dispatcher,
    )
    chunk.init_weights(config.seed)
    return chunk


def build_optimizer(runtime: Runtime) -> ZeroOptimizer:
    """DeepSpeed ZeRO over this rank's parameters, with our AdamW inside."""
    config, groups = runtime.config, runtime.groups

    def make(param_groups: list[dict]) -> torch.optim.Optimizer:
        return AdamW(
            param_groups,
            lr=config.optim.peak_lr,
            betas=config.optim.betas,
            eps=config.optim.eps,
            moments=config.optim.moments,
            seed=config.seed,
        )

    return ZeroOptimizer(
        runtime.named_params,
        groups=parameter_groups(runtime.named_params, config.optim.weight_decay, "experts"),
        make_optimizer=make,
        dp_group=groups.data,
        expert_dp_group=groups.expert_data,
        ep_group=groups.expert,
        norm_group=groups.norm,
        stage=config.layout.zero_stage,
        grad_clip=config.optim.grad_clip,
    )


def _build_dispatcher(
    config: RunConfig, layout: ResolvedLayout, mesh: Mesh, groups: Groups, ranks_per_node: int
) -> Dispatcher:
    placement = Placement(
        num_experts=config.model.num_experts,
        ep_size=mesh.ep,
        ep_rank=mesh.ep_rank,
        ranks_per_node=ranks_per_node,
    )
    return open_dispatcher(layout.dispatcher, placement, group=groups.expert)


def _placement(layout: ResolvedLayout, mesh: Mesh) -> list[tuple[int, int]]:
    """(direction, stage) pairs held by this pipeline rank."""
    pairs = [(0, mesh.pp_rank)]
    return [*pairs, (1, layout.pp - 1 - mesh.pp_rank)] if mesh.is_mirrored else pairs


def _tie_embedding(
    config: RunConfig, layout: ResolvedLayout, chunks: dict[int, Transformer]
) -> Parameter | None:
    """Share the embedding of MTP with the first stage's where both are here; else give the copy."""
    first, last = 0, layout.pp - 1
    if config.model.mtp_depth == 0 or first == last:
        return None
    if first in chunks and last in chunks:
        chunks[last].embed.weight = chunks[first].embed.weight
        return None
    if first in chunks:
        return chunks[first].embed.weight
    if last in chunks:
        copy = chunks[last].embed.weight
        copy.ds_pipe_replicated = True  # counted once in the gradient norm
        return copy
    return None


def _unique_parameters(chunks: dict[int, Transformer]) -> list[tuple[str, Parameter]]:
    seen: dict[int, str] = {}
    named = []
    for chunk in chunks.values():
        for name, param in chunk.named_parameters():
            if id(param) not in seen:
                seen[id(param)] = name
                named.append((name, param))
    return named


def _until_head(phases: Sequence[Phase]) -> Sequence[Phase]:
    """The phases up to the final norm; all of them in a chunk without a head."""
    ends = [i for i, phase in enumerate(phases) if isinstance(phase, Compute) and "hidden" in phase.outputs]
    return phases[: ends[0] + 1] if ends else phases


def _torch_transport(mesh: Mesh, groups: Groups) -> TorchTransport:
    assert groups.pipe_up is not None and groups.pipe_down is not None
    lane = [mesh.rank_at(row) for row in range(mesh.pp)]
    return TorchTransport(mesh.pp_rank, lane, groups.pipe_up, groups.pipe_down)
