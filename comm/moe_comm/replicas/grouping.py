"""Routing groups on nodes: whole groups, equally many on each, nodes as evenly loaded as can be.

Once groups have their nodes, each node is a part of its own; the global form is one part with one group.
"""

import torch
from torch import Tensor

from moe_comm.replicas.packing import deal, even_out


def place_groups(loads: Tensor, num_groups: int, num_parts: int) -> Tensor:
    """Give every part equally many whole groups.

    Args:
        loads: float64 [layers, experts].
        num_groups: divides the experts.
        num_parts: divides the groups.

    Returns:
        int64 [layers, parts, groups of a part].
    """
    group_loads = _group_loads(loads, num_groups)
    dealt = deal(group_loads, torch.ones_like(group_loads, dtype=torch.int64), num_parts)
    return even_out(dealt, group_loads, group_loads.sum(1) / num_parts)


def keep_groups(
    loads: Tensor, held: Tensor, fresh: Tensor, num_groups: int, slack: float
) -> tuple[Tensor, Tensor]:
    """The groups of a placement in use, exchanged only as far as a fresh choice is better than it.

    Args:
        loads: float64 [layers, experts].
        held: int64 [layers, parts, ranks, slots], the placement in use.
        fresh: int64 [layers, parts, groups of a part], as `place_groups` gives it.
        num_groups: divides the experts.
        slack: how much heavier than with `fresh` the heaviest part may be, as a fraction.

    Returns:
        int64 [layers, parts, groups of a part]; and bool [layers]: the placement in use had every group
        whole on one part, equally many on each. Where not, the groups are those of `fresh`.
    """
    layers, parts, per_part = fresh.shape
    presence = torch.zeros((layers, parts, loads.shape[1]), dtype=torch.bool)
    presence.scatter_(2, held.flatten(2), True)
    part_of = presence.long().argmax(1).view(layers, num_groups, -1)  # [layers, groups, experts of a group]
    whole = (presence.sum(1) == 1).all(1) & (part_of == part_of[:, :, :1]).flatten(1).all(1)
    group_parts = part_of[:, :, 0]
    sizes = torch.zeros((layers, parts), dtype=torch.int64).scatter_add_(
        1, group_parts, torch.ones_like(group_parts)
    )
    whole &= (sizes == per_part).all(1)
    kept = torch.argsort(group_parts, dim=1, stable=True).view(fresh.shape)
    kept = torch.where(whole[:, None, None], kept, fresh)
    group_loads = _group_loads(loads, num_groups)
    goal = part_loads(loads, members_of(fresh, num_groups, loads.shape[1])).amax(1) * (1.0 + slack)
    return even_out(kept, group_loads, goal), whole


def members_of(part_groups: Tensor, num_groups: int, num_experts: int) -> Tensor:
    """The experts of each part: bool [layers, parts, experts], from [layers, parts, groups of a part]."""
    chosen = torch.zeros((*part_groups.shape[:2], num_groups), dtype=torch.bool)
    return chosen.scatter_(2, part_groups, True).repeat_interleave(num_experts // num_groups, 2)


def part_loads(loads: Tensor, members: Tensor) -> Tensor:
    """Load of each part: float64 [layers, parts], from [layers, experts] and [layers, parts, experts]."""
    return (loads.unsqueeze(1) * members).sum(2)


def _group_loads(loads: Tensor, num_groups: int) -> Tensor:
    return loads.view(loads.shape[0], num_groups, -1).sum(2)
