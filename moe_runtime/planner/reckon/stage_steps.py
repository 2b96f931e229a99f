"""A stage as the list of phases that a rank runs, each with its time: the executor's list, on a clock.

    embed | attend dispatch shared experts combine | dense | merge | norm loss | mtp_in ... merge norm loss

The backward has the same phases backwards, the shared expert before the routed ones; weight gradients follow
each phase (`spread`) or are left out of the list.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from moe_runtime.planner.reckon import end_kernels
from moe_runtime.planner.reckon.kernel_time import KernelTimes
from moe_runtime.planner.reckon.kernels import Kernel, Phases, Shape, attend, dense, experts, shared
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.parts import StageParts
from moe_runtime.planner.reckon.two_lanes import TimedStep


@dataclass(frozen=True)
class Piece:
    """A phase of a stage: kernels of its three passes in seconds, or an exchange.

    Args:
        forward, input_grad, weight_grad: (alone, beside an exchange).
    """

    label: str
    layer: str
    forward: tuple[float, float]
    input_grad: tuple[float, float]
    weight_grad: tuple[float, float] = (0.0, 0.0)
    is_exchange: bool = False


class StageClock:
    """Times the phases of stages; each kind of phase is timed once.

    Args:
        machine: the run on its cluster.
        imbalance: rows that the fullest rank's experts get, over the mean.
    """

    def __init__(self, machine: Machine, imbalance: float = 1.0) -> None:
        self.machine, self.imbalance = machine, imbalance
        config, layout = machine.config, machine.layout
        model, tokens = config.model, machine.tokens
        self.shape = Shape(
            tokens=tokens,
            seq_len=config.batch.seq_len,
            rows=tokens * model.top_k * imbalance,
            local_experts=model.num_experts // layout.ep,
            fp8=config.precision == "fp8",
        )
        self._alone = KernelTimes(machine.cluster, machine.world, config.precision)
        self._beside = KernelTimes(machine.cluster, machine.world, config.precision, beside_exchange=True)
        self._timed: dict[str, Piece] = {}

    def pieces(self, parts: StageParts) -> list[Piece]:
        """The phases of a stage in forward order."""
        found = [self._end("embed", "embed", end_kernels.embed)] if parts.embedding else []
        for place in range(parts.dense):
            found.append(self._dense(f"dense.{place}"))
        for place in range(parts.moe):
            found += self._moe(f"moe.{place}")
        if parts.moe:
            found.append(self._end("merge", f"moe.{parts.moe - 1}", end_kernels.merge))
        if parts.head:
            found += self._head("head")
        for depth in range(parts.mtp):
            layer = f"mtp.{depth}"
            found.append(self._end("mtp_in", layer, end_kernels.mtp_in))
            found += [*self._moe(layer), self._end("merge", layer, end_kernels.merge), *self._head(layer)]
        return found

    def _head(self, layer: str) -> list[Piece]:
        return [
            self._end("norm", f"norm.{layer}", end_kernels.final_norm),
            self._end("loss", f"loss.{layer}", end_kernels.loss),
        ]

    def _moe(self, layer: str) -> list[Piece]:
        config, shape = self.machine.config, self.shape
        model, recompute = config.model, config.recompute
        block = [self._piece("attend", layer, lambda: attend(model, shape, recompute, router=True))]
        block.append(self._exchange("dispatch", layer))
        if model.num_shared_experts:
            block.append(self._piece("shared", layer, lambda: shared(model, shape, recompute)))
        block.append(self._piece("experts", layer, lambda: experts(model, shape, recompute)))
        return [*block, self._exchange("combine", layer)]

    def _dense(self, layer: str) -> Piece:
        config, shape = self.machine.config, self.shape

        def kernels() -> Phases:
            parts = (
                attend(config.model, shape, config.recompute, router=False),
                dense(config.model, shape, config.recompute),
            )
            return Phases(
                tuple(kernel for part in parts for kernel in part.forward),
                tuple(kernel for part in parts for kernel in part.input_grad),
                tuple(kernel for part in parts for kernel in part.weight_grad),
            )

        return self._piece("dense", layer, kernels)

    def _end(self, label: str, layer: str, kernels: Callable[..., Phases]) -> Piece:
        return self._piece(label, layer, lambda: kernels(self.machine.config.model, self.shape))

    def _piece(self, label: str, layer: str, kernels: Callable[[], Phases]) -> Piece:
        if label not in self._timed:
            made = kernels()
            forward, input_grad, weight_grad = map(
                self._both, (made.forward, made.input_grad, made.weight_grad)
            )
            self._timed[label] = Piece(label, "", forward, input_grad, weight_grad)
        return replace(self._timed[label], layer=layer)

    def _both(self, kernels: tuple[Kernel, ...]) -> tuple[float, float]:
        return self._alone.total(kernels), self._beside.total(kernels)

    def _exchange(self, label: Literal["dispatch", "combine"], layer: str) -> Piece:
        if label not in self._timed:
            # What the fullest rank receives tells: every rank of its group waits for it.
            there = self.imbalance * self.machine.exchange_s(label)
            back = self.machine.exchange_s("dispatch_backward" if label == "dispatch" else "combine_backward")
            back *= self.imbalance
            self._timed[label] = Piece(label, "", (there, there), (back, back), is_exchange=True)
        return replace(self._timed[label], layer=layer)


def forward_steps(pieces: list[Piece]) -> list[TimedStep]:
    """The forward of a stage."""
    return [TimedStep(one.label, one.layer, *one.forward, one.is_exchange) for one in pieces]


def backward_steps(pieces: list[Piece], weight_grads: bool) -> list[TimedStep]:
    """The backward of a stage; `weight_grads`: with those, each behind its phase."""
    steps: list[TimedStep] = []
    for one in _backward_order(pieces):
        steps.append(TimedStep(f"{one.label}_b", one.layer, *one.input_grad, one.is_exchange))
        if weight_grads and not one.is_exchange:
            steps.append(TimedStep(f"{one.label}_w", one.layer, *one.weight_grad))
    return steps


def _backward_order(pieces: list[Piece]) -> list[Piece]:
    """Reversed, but the shared expert before the routed ones."""
    order: list[Piece] = []
    for piece in reversed(pieces):
        follows_experts = piece.label == "shared" and bool(order) and order[-1].label == "experts"
        order.insert(len(order) - 1 if follows_experts else len(order), piece)
    return order
