"""How long a phase of the executor computes on a core, from its kernels and what was calibrated of it.

    core-seconds = fixed + operations of products and attention / rate + bytes x seconds a byte

Bytes are what the kernels between products read and write, and what products take in and put out: on a CPU
every result is memory that is taken from the system, touched for the first time, and given back. Weights are
left out; they stay in the cache.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.host import Host, PhaseCost
from moe_runtime.planner.reckon.kernel_time import TERA, curve_of
from moe_runtime.planner.reckon.kernels import Attention, Kernel, Move, Phases, Product, Shape, attend, dense
from moe_runtime.planner.reckon.kernels import experts as routed_and_shared

BF16 = 2
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


@dataclass(frozen=True)
class PhaseShape:
    """What a phase is run on.

    Args:
        tokens: of a microbatch.
        rows: (token, expert) pairs that the experts of a rank get in the mean.
        local_experts: of a rank.
    """

    tokens: int
    seq_len: int
    rows: float
    local_experts: int


def kernels_of(
    phase: str, model: ModelConfig, shape: PhaseShape, recompute: RecomputeConfig
) -> tuple[Kernel, ...]:
    """The kernels of a phase by the executor's word for it, such as `attend_b`; none for one of the
    framework's.

    Args:
        recompute: what its backward makes again.
    """
    name, _, way = phase.partition("_") if phase not in ("mtp_in", "mtp_in_b", "mtp_in_w") else _mtp(phase)
    of = Shape(shape.tokens, shape.seq_len, shape.rows, shape.local_experts, fp8=False)
    parts = _parts(name, model, of, recompute)
    return {"": parts.forward, "b": parts.input_grad, "w": parts.weight_grad}[way]


def _mtp(phase: str) -> tuple[str, str, str]:
    return "mtp_in", "_", phase.removeprefix("mtp_in").removeprefix("_")


def _parts(name: str, model: ModelConfig, shape: Shape, recompute: RecomputeConfig) -> Phases:
    tokens, hidden = shape.tokens, model.hidden_size
    stream = BF16 * tokens * hidden
    if name == "attend":
        return attend(model, shape, recompute, router=True)
    if name == "dense":
        both = attend(model, shape, recompute, router=False), dense(model, shape, recompute)
        return Phases(*(sum((getattr(part, way) for part in both), ()) for way in _WAYS))
    if name in ("experts", "shared"):
        return _only(routed_and_shared(model, shape, recompute), shared=name == "shared")
    if name == "loss":  # the gradient of a small head is made in the forward
        head = Product("head", tokens, hidden, model.vocab_size)
        grads = replace(head, inner=head.outer, outer=head.inner), replace(head, weight=True)
        kept = Move("gradients scaled", stream + BF16 * hidden * model.vocab_size)
        return Phases((head, *grads), (kept,), ())
    if name == "mtp_in":
        join = Product("join", tokens, 2 * hidden, hidden)
        back = replace(join, inner=hidden, outer=2 * hidden)
        norms = Move("norms", 6 * stream)
        return Phases((norms, join), (norms, back), (replace(join, weight=True),))
    moved = {"norm": 2, "merge": 3, "embed": 2, "mask": 1}.get(name)
    if moved is None:
        return Phases((), (), ())
    move = Move(name, moved * stream)
    return Phases((move,), (move,), ())


_WAYS = ("forward", "input_grad", "weight_grad")


def _only(phases: Phases, shared: bool) -> Phases:
    """The routed or the shared experts' kernels, without those of the exchange."""

    def kept(kernels: Iterable[Kernel]) -> tuple[Kernel, ...]:
        own = (one for one in kernels if one.name not in _OF_EXCHANGE)
        return tuple(one for one in own if ("shared" in one.name) == shared)

    return Phases(kept(phases.forward), kept(phases.input_grad), kept(phases.weight_grad))


def amount(kernels: Iterable[Kernel], cluster: Cluster, host: Host) -> Amount:
    """What kernels come to on a core of a host."""
    seconds = moved = 0.0
    peak = cluster.accelerator.peak_tflops.bf16 * TERA
    wide = host.item_bytes / BF16
    for kernel in kernels:
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
    shape: PhaseShape,
    cluster: Cluster,
    recompute: RecomputeConfig = _NO_RECOMPUTE,
) -> float:
    """Core-seconds of a phase; a phase that was never calibrated costs its kernels alone."""
    host = cluster.host
    assert host is not None, "a host's phases are asked of a cluster without one"
    due = amount(kernels_of(phase, model, shape, recompute), cluster, host)
    own = host.phases.get(phase, PhaseCost(fixed_us=0.0))
    return own.fixed_us * 1e-6 + due.seconds + due.bytes * own.ns_per_byte * 1e-9
