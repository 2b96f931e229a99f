"""What comes after the last backward: gradients summed, weights updated, weights gathered.

    gradients    FP32, over the ranks that hold the same weights, to the owners of their shares
    update       memory-bound: gradient read, master and moments read and written, weight written; before it
                 the norm reads the share, after it accumulators are zeroed and, under FP8, weights cast
    parameters   weights, from their owners to all

All ranks wait for the slowest, since the norm of all gradients comes before any update. Nothing of it flies
under the last backwards here, as in `parallel.zero`.
"""

from dataclasses import dataclass

from moe_runtime.planner.reckon.machine import GIGA, Machine
from moe_runtime.planner.reckon.states import MOMENTS, held_by
from moe_runtime.planner.reckon.wire import ITEM_BYTES

FP32 = 4


@dataclass(frozen=True)
class UpdateTime:
    """Seconds of the slowest rank."""

    gradients: float
    update: float
    parameters: float

    @property
    def total(self) -> float:
        """All three, one after the other."""
        return self.gradients + self.update + self.parameters


def update_time(machine: Machine) -> UpdateTime:
    """Of a step on this machine."""
    ranks = range(machine.layout.pp)
    traffic = [machine.step_traffic(rank) for rank in ranks]
    bandwidth = machine.cluster.accelerator.memory_gbps.rate(machine.world) * GIGA
    moved = max(_bytes(machine, rank) for rank in ranks)
    share = machine.cluster.kernels.memory_bound.rate(machine.world)
    return UpdateTime(
        gradients=max(machine.carry_s(one.gradients) for one in traffic),
        update=moved / (bandwidth * share),
        parameters=max(machine.carry_s(one.parameters) for one in traffic),
    )


def _bytes(machine: Machine, rank: int) -> float:
    """Read and written by a pipeline rank's update."""
    config, layout = machine.config, machine.layout
    held = held_by(config.model, layout, rank)
    owners = layout.dp * len(layout.placement)
    owned = (held.weights - held.experts) / owners + held.experts / (owners / layout.ep)
    item = ITEM_BYTES[config.precision]
    # The norm and the update each read the gradient.
    each = 2 * FP32 + 2 * FP32 + 2 * MOMENTS[config.optim.moments] + item
    casts = (item + 2) if config.precision == "fp8" else 0
    return owned * each + held.weights * (FP32 + casts)
