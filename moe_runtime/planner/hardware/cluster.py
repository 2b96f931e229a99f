"""Hardware as data: what `configs/cluster/*.yaml` holds, with units in the names of keys.

Every figure has a source; what is known as a range is one (`estimate.py`). Peaks are dense, without
sparsity. Efficiencies are shares of the peak that published kernels reach on shapes that were published with
them; none is fitted to a training run, so that a run that was published can be held against a plan.

    product             time is the longer of operations / (peak x share) and bytes / memory bandwidth
    share of a product  over its inner width K, the sum that each output takes; a short one ends before the
                        pipeline of the kernel is full. Weight gradients sum over tokens
    memory-bound        norms, casts, SwiGLU, permutation, optimizer: bytes / (bandwidth x share)

Computation beside communication has fewer multiprocessors: `communication.multiprocessors` are taken from
products and attention while an exchange flies.
"""

from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from moe_runtime.config.finding import Finding
from moe_runtime.config.section import Section
from moe_runtime.planner.hardware.estimate import Curve, Estimate
from moe_runtime.planner.hardware.host import Host


class Peaks(Section):
    """Dense peak rates, TFLOP/s."""

    bf16: PositiveFloat
    fp8: PositiveFloat | None = Field(None, description="null: none, FP8 runs as BF16 does")
    fp32: PositiveFloat | None = Field(None, description="not TF32; null: not known, FP32 is not planned")


class Accelerator(Section):
    """One GPU, or one process of a CPU."""

    name: str
    memory_gb: PositiveFloat = Field(description="10^9 bytes that a program can have")
    memory_gbps: Estimate = Field(description="10^9 bytes/s that a copy reaches, read and written together")
    peak_tflops: Peaks
    multiprocessors: PositiveInt
    source: str

    def findings(self) -> list[Finding]:
        """Memory moves."""
        return _moves("memory_gbps", self.memory_gbps)


class Link(Section):
    """A way between accelerators, for each of them and in each direction."""

    gbps: Estimate = Field(description="10^9 bytes/s that large messages reach")
    latency_us: Estimate = Field(description="of a small message")
    source: str = ""

    def findings(self) -> list[Finding]:
        """It carries."""
        return _moves("gbps", self.gbps)


class Products(Section):
    """Shares of the peak over the inner width."""

    dense: Curve
    groups: Curve = Field(description="of expert products, with hundreds of rows a group or more")
    weight: Curve = Field(description="weight gradients, over the tokens that they sum")
    weight_groups: Curve

    def findings(self) -> list[Finding]:
        """Shares are shares."""
        return [found for name in type(self).model_fields for found in _shares(name, getattr(self, name))]


class Kernels(Section):
    """What kernels reach."""

    bf16: Products
    fp8: Products | None = None
    attention_forward: Curve = Field(description="share of the BF16 peak over the sequence length, causal")
    attention_backward: Curve
    memory_bound: Estimate = Field(description="share of memory_gbps that norms, casts and SwiGLU reach")
    launch_us: Estimate = Field(description="from the end of one kernel to the start of the next")

    def findings(self) -> list[Finding]:
        """Shares are shares."""
        attention = [
            _shares(name, getattr(self, name)) for name in ("attention_forward", "attention_backward")
        ]
        return [*attention[0], *attention[1], *_share("memory_bound", self.memory_bound)]


class Communication(Section):
    """What exchanges take and hold."""

    multiprocessors: Estimate = Field(description="held while dispatch or combine fly")
    start_us: Estimate = Field(description="of an exchange, from its call to its first byte")


class Failures(Section):
    """How often machines fail, and what that costs."""

    per_node_day: Estimate
    restart_minutes: Estimate = Field(description="from a failure to the first step after it")
    save_s: Estimate = Field(description="training stands still for a checkpoint")


class Cluster(Section):
    """A machine that a run could be on."""

    name: str
    accelerator: Accelerator
    accelerators_a_node: PositiveInt = Field(description="joined by the fast link")
    fast: Link
    network: Link
    kernels: Kernels
    communication: Communication
    failures: Failures
    price_usd_hour: Estimate = Field(description="of one accelerator")
    host: Host | None = Field(None, description="its accelerators are processes of one machine")

    def findings(self) -> list[Finding]:
        """Exchanges leave multiprocessors to computation."""
        held, there = self.communication.multiprocessors.high, self.accelerator.multiprocessors
        if held == 0 or held < there:
            return []
        wanted = f"less than the {there} of the accelerator"
        return [Finding.expected("communication.multiprocessors", wanted, f"{held:g}")]


def _moves(key: str, rate: Estimate) -> list[Finding]:
    return [] if rate.low > 0 else [Finding.expected(f"{key}.low", "more than 0", f"{rate.low:g}")]


def _share(key: str, share: Estimate) -> list[Finding]:
    if share.low > 0 and share.high <= 1:
        return []
    return [Finding.expected(key, "shares above 0 and at most 1", f"{share.low:g} to {share.high:g}")]


def _shares(key: str, curve: Curve) -> list[Finding]:
    named = ((f"{key}.points.{place}", point.value) for place, point in enumerate(curve.points))
    return [found for name, value in named for found in _share(name, value)]


def cluster_file(name: str, roots: list[Path]) -> Path | None:
    """`configs/cluster/NAME.yaml` below one of the roots, or a path as it is."""
    candidates = [Path(name), *(root / "cluster" / f"{name}.yaml" for root in roots)]
    return next((file for file in candidates if file.is_file()), None)
