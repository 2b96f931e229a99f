"""The result of a re-placement: what each slot holds, and how well that balances loads.

All figures are computed from the slots alone, whatever search has found them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.errors import PlacementError
from moe_comm.replicas.grouping import part_loads
from moe_comm.replicas.packing import add_copies, count_copies, rank_loads, shares_of


@dataclass(frozen=True)
class ExpertLayout:
    """What each physical slot holds, and how well that balances the loads it was made for.

    Args:
        slot_experts: int64 [layers, num_slots] expert in each slot; rank r holds the r-th equal part.
        replicas: int64 [layers, experts] copies of each expert, at least 1.
        form: "hierarchical" or "global".
        num_nodes: machines.
        ranks_per_node: ranks of each; rank r is on node r // ranks_per_node.
        max_over_mean: float64 [layers] heaviest rank over mean rank; 1 where there is no load.
        node_max_over_mean: float64 [layers] the same of nodes; never above max_over_mean.
        bound: float64 [layers]; no placement of as many slots, with the same experts on each node, has a
            smaller max_over_mean.
        moved: int64 [layers] slots whose expert was not on that rank in `previous`; zeros without one.
    """

    slot_experts: Tensor
    replicas: Tensor
    form: str
    num_nodes: int
    ranks_per_node: int
    max_over_mean: Tensor
    node_max_over_mean: Tensor
    bound: Tensor
    moved: Tensor

    @property
    def num_ranks(self) -> int:
        """Ranks of all nodes."""
        return self.num_nodes * self.ranks_per_node

    def expert_slots(self) -> Tensor:
        """The slots of each expert, ascending: int64 [layers, experts, most copies], padded with -1."""
        layers, num_slots = self.slot_experts.shape
        order = torch.argsort(self.slot_experts, dim=1, stable=True)
        sorted_experts = self.slot_experts.gather(1, order)
        starts = self.replicas.cumsum(1) - self.replicas
        nth = torch.arange(num_slots) - starts.gather(1, sorted_experts)
        table = torch.full((*self.replicas.shape, int(self.replicas.max())), -1)
        table[torch.arange(layers)[:, None], sorted_experts, nth] = order
        return table


@dataclass(frozen=True)
class LoadSplit:
    """Load of each rank under the plain layout and under another; float64 [layers, ranks] each.

    Args:
        before: one slot an expert, in order, cut into parts as equal as can be.
        after: as an `ExpertLayout` has it.
    """

    before: Tensor
    after: Tensor


def split_load(loads: Tensor, placement: ExpertLayout) -> LoadSplit:
    """What each rank has to do, before and after a re-placement.

    Args:
        loads: int or float [layers, experts]; may be others than those the placement was made for.
        placement: as `rebalance` gives it.

    Raises:
        PlacementError: loads are of another number of layers or experts.
    """
    if loads.shape != placement.replicas.shape:
        raise PlacementError(
            f"split_load: expected loads {list(placement.replicas.shape)} as placed, got {list(loads.shape)}"
        )
    exact = loads.detach().to("cpu", torch.float64)
    ranks = placement.num_ranks
    before = exact.new_zeros((exact.shape[0], ranks)).index_add_(1, plain_ranks(exact.shape[1], ranks), exact)
    experts = placement.slot_experts.view(exact.shape[0], 1, ranks, -1)
    return LoadSplit(before, layer_rank_loads(exact, experts))


def measure_layout(
    loads: Tensor, experts: Tensor, form: str, nodes: tuple[int, int], moved: Tensor
) -> ExpertLayout:
    """The finished layout.

    Args:
        loads: float64 [layers, experts].
        experts: int64 [layers, parts, ranks of a part, slots]; a part is a node, or everything.
        form: the form that it has.
        nodes: their number, and ranks of each.
        moved: int64 [layers].
    """
    layers, parts, ranks, slots = experts.shape
    counts = count_copies(experts.flatten(1, 2), loads.shape[1])
    by_rank = layer_rank_loads(loads, experts)
    members = count_copies(experts.flatten(0, 1), loads.shape[1]) > 0
    local = loads.repeat_interleave(parts, 0).masked_fill(~members, 0.0)
    spare = ranks * slots - loads.shape[1] // parts
    largest = shares_of(local, add_copies(local, members.long(), spare, ranks)).amax(1).view(layers, parts)
    floor = torch.maximum(part_loads(loads, members.view(layers, parts, -1)) / ranks, largest).amax(1)
    mean = by_rank.mean(1)
    return ExpertLayout(
        slot_experts=experts.flatten(1),
        replicas=counts,
        form=form,
        num_nodes=nodes[0],
        ranks_per_node=nodes[1],
        max_over_mean=max_over_mean(by_rank),
        node_max_over_mean=max_over_mean(node_loads(by_rank, nodes[0])),
        bound=torch.where(mean > 0, floor / mean.clamp(min=torch.finfo(torch.float64).tiny), 1.0),
        moved=moved,
    )


def layer_rank_loads(loads: Tensor, experts: Tensor) -> Tensor:
    """float64 [layers, all ranks], from experts [layers, parts, ranks, slots]."""
    flat = experts.flatten(1, 2)
    return rank_loads(flat, shares_of(loads, count_copies(flat, loads.shape[1])))


def node_loads(by_rank: Tensor, num_nodes: int) -> Tensor:
    """float64 [layers, nodes], from [layers, ranks]."""
    return by_rank.view(by_rank.shape[0], num_nodes, -1).sum(2)


def max_over_mean(by_bin: Tensor) -> Tensor:
    """float64 [layers]; 1 for a layer without load."""
    mean = by_bin.mean(1)
    return torch.where(mean > 0, by_bin.amax(1) / mean.clamp(min=torch.finfo(torch.float64).tiny), 1.0)


def plain_ranks(num_experts: int, num_ranks: int) -> Tensor:
    """Rank of each expert when they are laid out in order: int64 [experts]."""
    return torch.arange(num_experts) * num_ranks // num_experts
