"""The only place that turns a RunConfig into objects: the model's part of a rank, and its optimizer.

Whatever one rank finds wrong here, all ranks say alike.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from moe_comm.dispatcher import Dispatcher
from moe_comm.errors import PlacementError
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from torch.nn import Parameter

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.fp8.gemm_choice import cannot_run
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.watch import Fp8Watch
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.phase import Compute, Phase
from moe_runtime.model.transformer import Transformer
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.groups import parameter_groups
from moe_runtime.parallel.clock import Clock, open_clock
from moe_runtime.parallel.executor import Executor
from moe_runtime.parallel.expert_load import ExpertLoad
from moe_runtime.parallel.mesh import Groups, Mesh
from moe_runtime.parallel.p2p import Transport, open_transport
from moe_runtime.parallel.router_meters import RouterMeters
from moe_runtime.parallel.runtime import Runtime
from moe_runtime.parallel.shared_weights import tie_and_name
from moe_runtime.parallel.stage import StageRunner
from moe_runtime.parallel.weight_grad import WeightGradSink
from moe_runtime.parallel.zero import ZeroOptimizer

# Of weights and activations; under fp8 what is multiplied in FP8 is cast where it is read.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64, "fp8": torch.bfloat16}


def build_mesh(layout: ResolvedLayout, rank: int) -> Mesh:
    """The coordinates of one rank."""
    first_direction = layout.placement[0]
    return Mesh(
        layout.pp,
        layout.dp,
        layout.ep,
        is_mirrored=len(layout.placement) == 2,
        rank=rank,
        is_folded=layout.pp > 1 and first_direction[0] == first_direction[-1],
    )


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
        ranks_per_node: processes on each machine; the config may say otherwise.
        document_separator: token after which attention starts anew; None attends over everything.
        transport: between pipeline ranks; None takes torch.distributed.
    """
    dispatcher = _build_dispatcher(config, layout, mesh, groups, ranks_per_node)
    places = _places(layout, mesh.pp_rank)
    chunks = {
        stage: build_chunk(config, layout, mesh, stage, dispatcher, device, document_separator)
        for stage in sorted({stage for _, stage in places})
    }
    casts, watch = _use_precision(config, chunks, device)
    tied, named = tie_and_name(config.model.mtp_depth, layout.num_stages, chunks)
    sink, clock = _open_sink(named), open_clock(mesh.ep, device, ranks_per_node)
    meters, load = _open_meters(config, chunks, dispatcher, device)
    open_executor = partial(
        Executor,
        mesh.pp_rank,
        transport=transport or open_transport(mesh, groups, device),
        boundary_dtype=DTYPES[config.precision],
        hidden_size=config.model.hidden_size,
        device=device,
        clock=clock,
        needs_tokens=document_separator is not None,
        extra_tokens=1 + config.model.mtp_depth,
        overlap=config.layout.overlap,
    )
    make = partial(_open_runner, config, dispatcher, sink, load, clock)
    return Runtime(
        config=config,
        layout=layout,
        mesh=mesh,
        groups=groups,
        device=device,
        chunks=chunks,
        named_params=named,
        tied_embedding=tied,
        weight_casts=casts,
        fp8_watch=watch,
        load=load,
        meters=meters,
        clock=clock,
        dispatcher=dispatcher,
        executor=open_executor(_runners(chunks, places, make)),
        sampler=open_executor(_runners(chunks, places, lambda phases: make(_until_head(phases)))),
    )


def _open_meters(
    config: RunConfig, chunks: dict[int, Transformer], dispatcher: Dispatcher, device: torch.device
) -> tuple[RouterMeters, ExpertLoad]:
    """What routers tell of their choices, and what counts the tokens of each expert, layer by layer."""
    meters = RouterMeters(chunks.values(), dispatcher.placement, device)
    return meters, ExpertLoad(meters.layers, config.model.num_experts, device)


def _open_sink(named: Sequence[tuple[str, Parameter]]) -> WeightGradSink:
    """Where weight gradients of these parameters go."""
    sink = WeightGradSink()
    sink.install(param for _, param in named)
    return sink


def _open_runner(
    config: RunConfig,
    dispatcher: Dispatcher,
    sink: WeightGradSink,
    load: ExpertLoad,
    clock: Clock,
    phases: Sequence[Phase],
) -> StageRunner:
    """What runs the phases of one chunk."""
    rounds, overlap = config.layout.overflow == "rounds", config.layout.overlap
    return StageRunner(phases, dispatcher, sink, load.add, clock, rounds=rounds, waits_at_once=not overlap)


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
        has_head=stage == layout.num_stages - 1,
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


def _use_precision(
    config: RunConfig, chunks: dict[int, Transformer], device: torch.device
) -> tuple[WeightCasts, Fp8Watch]:
    """Let the model multiply in FP8 if the config says so; gives what holds casts, and what counts them."""
    casts, watch = WeightCasts(), Fp8Watch()
    if config.precision == "fp8":
        wanted = config.fp8.backend
        reason = None if wanted == "auto" else cannot_run(wanted, device)
        if reason:
            raise ConfigError(f"fp8.backend: {wanted} expects {reason}; choose another, or auto")
        for chunk in chunks.values():
            use_fp8(chunk, Policy(config.fp8), casts, watch=watch)
    return casts, watch


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
        weights_written=runtime.weight_casts.drop,
    )


def _build_dispatcher(
    config: RunConfig, layout: ResolvedLayout, mesh: Mesh, groups: Groups, ranks_per_node: int
) -> Dispatcher:
    wanted, keeps_tiles = config.layout, _experts_read_tiles(config)
    wire = "fp8_pow2" if keeps_tiles and wanted.wire == "auto" else wanted.wire
    try:
        placement = Placement(
            num_experts=config.model.num_experts,
            ep_size=mesh.ep,
            ep_rank=mesh.ep_rank,
            ranks_per_node=wanted.ranks_per_node or ranks_per_node,
            first_rank=mesh.rank - mesh.ep_rank,
            num_groups=config.model.num_groups,
        )
        return open_dispatcher(
            layout.dispatcher,
            placement,
            group=groups.expert,
            wire=wire,
            max_rows=wanted.max_rows,
            confirm=False,  # what ranks call is fixed by the program and by one table
            keep_tiles=keeps_tiles and wire == "fp8_pow2",
        )
    except PlacementError as error:
        raise ConfigError(f"layout.dispatcher: {error}") from error


def _experts_read_tiles(config: RunConfig) -> bool:
    """True if rows that arrive as FP8 tiles are what experts multiply."""
    choice = Policy(config.fp8).of("moe.experts") if config.precision == "fp8" else None
    return choice is not None and choice.fprop


def _places(layout: ResolvedLayout, pp_rank: int) -> list[tuple[int, int]]:
    """(direction, stage) pairs held by a pipeline rank."""
    return [
        (direction, stage)
        for direction, ranks in enumerate(layout.placement)
        for stage, holder in enumerate(ranks)
        if holder == pp_rank
    ]


def _runners(
    chunks: dict[int, Transformer],
    places: list[tuple[int, int]],
    make: Callable[[Sequence[Phase]], StageRunner],
) -> dict[tuple[int, int], StageRunner]:
    """One runner a stage, under each (direction, stage) that is held here."""
    made = {stage: make(chunk.phases()) for stage, chunk in chunks.items()}
    return {(direction, stage): made[stage] for direction, stage in places}


def _until_head(phases: Sequence[Phase]) -> Sequence[Phase]:
    """The phases up to the final norm; all of them in a chunk without a head."""
    ends = [i for i, phase in enumerate(phases) if isinstance(phase, Compute) and "hidden" in phase.outputs]
    return phases[: ends[0] + 1] if ends else phases
