"""What comes after the last backward: gradients summed, weights updated, weights gathered.

    gradients    FP32, over the ranks that hold the same weights, to the owners of their shares
    update       memory-bound: gradient read, master and moments read and written, weight written; before it
                 the norm reads the share, after it accumulators are zeroed and, under FP8, weights cast
    parameters   weights, from their owners to all

A sum or a gathering over n ranks goes round rings: what they send at the bandwidth of the links, and n - 1
hops of latency for every message. Gradients go in messages of a bucket, so over thousands of ranks hops are
most of it; weights go in one message a flat group.

All ranks wait for the slowest, since the norm of all gradients comes before any update. Nothing of it flies
under the last backwards here, as in `parallel.zero`.
"""

from dataclasses import dataclass

from moe_runtime.planner.reckon.machine import GIGA, MICRO, Machine
from moe_runtime.planner.reckon.states import BUCKET, MOMENTS, held_by
from moe_runtime.planner.reckon.traffic import replica_groups
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


def update_time(machine: Machine, bucket: int = BUCKET) -> UpdateTime:
    """Of a step on this machine.

    Args:
        bucket: gradients in one message; another than the runtime's is for studies.
    """
    ranks = range(machine.layout.pp)
    traffic = [machine.step_traffic(rank) for rank in ranks]
    bandwidth = machine.cluster.accelerator.memory_gbps.rate(machine.world) * GIGA
    moved = max(_bytes(machine, rank) for rank in ranks)
    share = machine.cluster.kernels.memory_bound.rate(machine.world)
    summed = [machine.carry_s(traffic[rank].gradients) + _hops(machine, rank, bucket) for rank in ranks]
    gathered = [machine.carry_s(traffic[rank].parameters) + _hops(machine, rank) for rank in ranks]
    return UpdateTime(max(summed), moved / (bandwidth * share), max(gathered))


def _hops(machine: Machine, rank: int, message: int | None = None) -> float:
    """Latency of all rings of a pipeline rank, one after the other.

    Args:
        message: weights in one; None: all of a group.
    """
    links = (machine.cluster.fast, machine.cluster.network)
    fast, network = (link.latency_us.burden(machine.world) * MICRO for link in links)
    seconds = 0.0
    for group in replica_groups(machine.config.model, machine.layout, rank, machine.ranks_per_node):
        nodes = group.ranks // group.near
        messages = -(-group.weights // message) if message else min(group.weights, 1)
        seconds += messages * ((group.ranks - nodes) * fast + (nodes - 1) * network)
    return seconds


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
