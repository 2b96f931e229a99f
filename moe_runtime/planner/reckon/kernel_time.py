"""How long a kernel takes on a machine, in seconds.

    product      the longer of operations / (peak x share) and bytes / memory bandwidth
    attention    operations / (peak of BF16, or FP32, x share)
    move         bytes / (memory bandwidth x share)

Each kernel is followed by the gap to the next. Beside an exchange, products and attention have the
multiprocessors that it leaves; what is bound by memory is not slowed by that.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from moe_runtime.planner.hardware.cluster import Cluster, Products
from moe_runtime.planner.hardware.estimate import Curve, World
from moe_runtime.planner.reckon.kernels import Attention, Kernel, Move, Product
from moe_runtime.planner.reckon.wire import ITEM_BYTES

TERA, GIGA, MICRO = 1e12, 1e9, 1e-6
FP32, BF16 = 4, 2


@dataclass(frozen=True)
class KernelTimes:
    """Times on one accelerator.

    Args:
        cluster: the machine.
        world: which end of its ranges.
        precision: of the run; the sizes of kernels are those of BF16, and FP32 doubles what is moved.
        beside_exchange: an exchange holds its multiprocessors meanwhile.
    """

    cluster: Cluster
    world: World
    precision: str
    beside_exchange: bool = False

    def total(self, kernels: Iterable[Kernel]) -> float:
        """Seconds of kernels one after the other."""
        return sum(self.of(kernel) for kernel in kernels)

    def of(self, kernel: Kernel) -> float:
        """Seconds of one kernel and the gap behind it."""
        gap = self.cluster.kernels.launch_us.burden(self.world) * MICRO
        if isinstance(kernel, Move):
            return gap + self._item / BF16 * kernel.bytes / (self._bandwidth * self._moved_share)
        if isinstance(kernel, Attention):
            return gap + self._attention(kernel) / self._left
        return gap + max(self._product(kernel) / self._left, self._bytes(kernel) / self._bandwidth)

    @property
    def _left(self) -> float:
        """Share of multiprocessors that computation has."""
        if not self.beside_exchange:
            return 1.0
        held = self.cluster.communication.multiprocessors.burden(self.world)
        return 1.0 - held / self.cluster.accelerator.multiprocessors

    @property
    def _item(self) -> int:
        """Bytes of a value that is not cast."""
        return ITEM_BYTES[self.precision]

    @property
    def _bandwidth(self) -> float:
        return self.cluster.accelerator.memory_gbps.rate(self.world) * GIGA

    @property
    def _moved_share(self) -> float:
        return self.cluster.kernels.memory_bound.rate(self.world)

    def _attention(self, kernel: Attention) -> float:
        curves = self.cluster.kernels
        curve = curves.attention_backward if kernel.backward else curves.attention_forward
        return kernel.flops / (self._peak(False) * curve.rate(kernel.seq_len, self.world))

    def _product(self, kernel: Product) -> float:
        fp8 = self._in_fp8(kernel)
        products = self.cluster.kernels.fp8 if fp8 else self.cluster.kernels.bf16
        assert products is not None, "FP8 products without curves"
        share = curve_of(products, kernel).rate(max(kernel.sum_over, 1.0), self.world)
        return kernel.flops / (self._peak(fp8) * share)

    def _in_fp8(self, kernel: Product) -> bool:
        peaks, kernels = self.cluster.accelerator.peak_tflops, self.cluster.kernels
        return self.precision == "fp8" and kernel.fp8 and peaks.fp8 is not None and kernels.fp8 is not None

    def _peak(self, fp8: bool) -> float:
        peaks = self.cluster.accelerator.peak_tflops
        peak = peaks.fp8 if fp8 else peaks.fp32 if self.precision == "fp32" else peaks.bf16
        assert peak is not None, f"{self.cluster.name} has no peak for {self.precision}"
        return peak * TERA

    def _bytes(self, kernel: Product) -> float:
        """Both factors read and the result written once."""
        item = 1 if self._in_fp8(kernel) else self._item
        weights = kernel.groups * kernel.inner * kernel.outer
        if kernel.weight:
            return kernel.rows * (kernel.inner + kernel.outer) * item + weights * 2 * FP32
        return kernel.rows * (kernel.inner * item + kernel.outer * self._item) + weights * item


def curve_of(products: Products, kernel: Product) -> Curve:
    if kernel.weight:
        return products.weight if kernel.groups == 1 else products.weight_groups
    return products.dense if kernel.groups == 1 else products.groups
