"""How long a phase of the executor computes on a core, from its kernels and what was calibrated of it.

    core-seconds = fixed + operations of products and attention / rate + bytes x seconds a byte

Bytes are what the kernels between products read and write, and what products take in and put out: on a CPU
every result is memory that is taken from the system, touched for the first time, and given back. Weights are
left out; they stay in the cache.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moe_runtime.config.schema import ModelConfig, RecomputeConfig, RunConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.host import Host, PhaseCost
from moe_runtime.planner.reckon import end_kernels, kernels
from moe_runtime.planner.reckon.kernel_time import TERA, curve_of
from moe_runtime.planner.reckon.kernels import BF16, Attention, Kernel, Move, Phases, Shape

_NO_RECOMPUTE = RecomputeConfig()
_OF_EXCHANGE = ("rows in order", "rows back")


@dataclass(frozen=True)
class Amount:
    """What a phase has to do.

    Args:
        seconds: of its products and attention on one core, at the rates of the cluster.
        bytes: read and written beside them.
    """

    seconds: float
    bytes: float


def phase_shape(config: RunConfig) -> Shape:
    """What one microbatch of a run gives its phases to do; nothing is multiplied in FP8 on a CPU."""
    tokens = config.batch.micro_batch_size * config.batch.seq_len
    local = config.model.num_experts // config.layout.ep
    return Shape(tokens, config.batch.seq_len, float(tokens * config.model.top_k), local, fp8=False)


def kernels_of(
    phase: str, model: ModelConfig, shape: Shape, recompute: RecomputeConfig
) -> tuple[Kernel, ...]:
    """The kernels of a phase by the executor's word for it, such as `attend_b`; none of a mere start.

    Args:
        recompute: what its backward makes again.
    """
    ways = {"_b": "input_grad", "_w": "weight_grad"}
    way = ways.get(phase[-2:], "forward")
    name = phase[:-2] if phase[-2:] in ways else phase
    return _of(name, model, shape, recompute, way)


def _of(
    name: str, model: ModelConfig, shape: Shape, recompute: RecomputeConfig, way: str
) -> tuple[Kernel, ...]:
    parts: dict[str, Callable[[], tuple[Phases, ...]]] = {
        "attend": lambda: (kernels.attend(model, shape, recompute, router=True),),
        "dense": lambda: (
            kernels.attend(model, shape, recompute, router=False),
            kernels.dense(model, shape, recompute),
        ),
        "experts": lambda: (kernels.experts(model, shape, recompute),),
        "shared": lambda: (kernels.shared(model, shape, recompute),),
        "embed": lambda: (end_kernels.embed(model, shape),),
        "merge": lambda: (end_kernels.merge(model, shape),),
        "norm": lambda: (end_kernels.final_norm(model, shape),),
        "loss": lambda: (end_kernels.loss(model, shape),),
        "mtp_in": lambda: (end_kernels.mtp_in(model, shape),),
    }
    found: Iterable[Kernel] = (kernel for part in parts.get(name, tuple)() for kernel in getattr(part, way))
    return tuple(one for one in found if one.name not in _OF_EXCHANGE)


def amount(of: Iterable[Kernel], cluster: Cluster, host: Host) -> Amount:
    """What kernels come to on a core of a host."""
    seconds = moved = 0.0
    peak = cluster.accelerator.peak_tflops.bf16 * TERA
    wide = host.item_bytes / BF16
    for kernel in of:
        if isinstance(kernel, Move):
            moved += kernel.bytes * wide
        elif isinstance(kernel, Attention):
            curves = cluster.kernels
            curve = curves.attention_backward if kernel.backward else curves.attention_forward
            seconds += kernel.flops / (peak * curve.rate(kernel.seq_len, "central"))
        else:
            share = curve_of(cluster.kernels.bf16, kernel).rate(max(kernel.sum_over, 1.0), "central")
            seconds += kernel.flops / (peak * share)
            moved += kernel.rows * (kernel.inner + kernel.outer) * host.item_bytes
    return Amount(seconds, moved)


def phase_seconds(
    phase: str,
    model: ModelConfig,
    shape: Shape,
    cluster: Cluster,
    recompute: RecomputeConfig = _NO_RECOMPUTE,
) -> float:
    """Core-seconds of a phase; a phase that was never calibrated costs its kernels alone."""
    host = cluster.host
    assert host is not None, "a host's phases are asked of a cluster without one"
    due = amount(kernels_of(phase, model, shape, recompute), cluster, host)
    own = host.phases.get(phase, PhaseCost(fixed_us=0.0))
    return own.fixed_us * 1e-6 + due.seconds + due.bytes * own.ns_per_byte * 1e-9
