"""The index work of two hops: who gets which row, and what is summed where. Pure functions.

Words. The ranks of all nodes with the same place in their node form a *lane*; rank = node x lanes +
lane. The *far* hop runs within a lane, from node to node; the *near* hop within a node, from lane to
lane. Both fan out: of each row, one copy to every place that has at least one of its experts.

    source (node 0, lane 1)  --far-->  (node n, lane 1)  --near-->  (node n, lane j), expert by expert
                             <-------  sum over lanes    <-------   sum over its experts
     sum over nodes

A dispatch is cut into chunks of consecutive tokens, so that one chunk takes the second hop while the
next one still takes the first.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from moe_comm.placement import Placement
from moe_comm.routing import Bags, SendPlan, plan_send, reorder_blocks


@dataclass(frozen=True)
class FanOut:
    """Copies of rows for several places.

    Args:
        order: int64 [copies] row of each copy, by place, then row.
        counts: copies for each place.
        bags: the copies of each row, by place: what comes back for a row is their sum.
    """

    order: Tensor
    counts: tuple[int, ...]
    bags: Bags

    @classmethod
    def of(cls, chosen: Tensor) -> "FanOut":
        """Copy each row to the places that it chose.

        Args:
            chosen: bool [rows, places].
        """
        by_place = chosen.t()
        position = (by_place.reshape(-1).cumsum(0) - 1).view(by_place.shape).t()
        return cls(
            order=by_place.nonzero()[:, 1],
            counts=tuple(chosen.sum(0).tolist()),
            bags=Bags.of(torch.where(chosen, position, -1)),
        )


@dataclass(frozen=True)
class Landing:
    """How records that have arrived become rows of experts, and are summed again.

    Args:
        plan: rows of the records in order of (source rank, token): the order that `alltoall` gives.
        to_expert: int64 [rows] arrived record of each row.
        from_arrival: int64 [records] which record of `plan` an arrived one is.
        bags: the rows of each arrived record, in order of choice.
    """

    plan: SendPlan
    to_expert: Tensor
    from_arrival: Tensor
    bags: Bags


def chunk_bounds(num_tokens: int, chunks: int) -> list[tuple[int, int]]:
    """Consecutive ranges [first, end) of tokens, as equal as can be; some are empty if tokens are few."""
    edges = [num_tokens * chunk // chunks for chunk in range(chunks + 1)]
    return list(pairwise(edges))


def chosen_parts(expert_ids: Tensor, first: int, experts_per_part: int, num_parts: int) -> Tensor:
    """Which consecutive parts of the experts each line chose at least once.

    Args:
        expert_ids: [rows, top_k] integers; -1 and experts of no part choose nothing.
        first: the first expert of the first part.
        experts_per_part: experts of a part.
        num_parts: nodes, or ranks.

    Returns:
        bool [rows, num_parts].
    """
    part = torch.div(expert_ids.to(torch.int64) - first, experts_per_part, rounding_mode="floor")
    part = part.masked_fill((expert_ids < 0) | (part < 0) | (part >= num_parts), num_parts)
    chosen = torch.zeros((expert_ids.shape[0], num_parts + 1), dtype=torch.bool, device=expert_ids.device)
    return chosen.scatter_(1, part, True)[:, :num_parts]


def counts_for_all(expert_ids: Tensor, placement: Placement, chunks: int) -> Tensor:
    """What this rank tells each rank before a dispatch.

    Args:
        expert_ids: int64 [tokens, top_k].
        placement: where experts live.
        chunks: parts of a dispatch.

    Returns:
        int64 [ep_size, ep_size + 2 * chunks]. To rank d: rows (token, expert) for every rank; tokens
        that end on d, by chunk; tokens for d's node, by chunk.
    """
    size, lanes, nodes = placement.ep_size, placement.lanes, placement.num_nodes
    local_experts = placement.local_experts
    present = expert_ids[expert_ids >= 0]
    rows = torch.bincount(torch.div(present, local_experts, rounding_mode="floor"), minlength=size)
    to_rank = chosen_parts(expert_ids, 0, local_experts, size)
    to_node = to_rank.view(-1, nodes, lanes).any(2)
    bounds = chunk_bounds(expert_ids.shape[0], chunks)
    ending = torch.stack([to_rank[first:end].sum(0) for first, end in bounds], 1)
    crossing = torch.stack([to_node[first:end].sum(0) for first, end in bounds], 1)
    return torch.cat((rows.expand(size, size), ending, crossing.repeat_interleave(lanes, 0)), dim=1)


def land(expert_ids: Tensor, ending: Tensor, placement: Placement) -> Landing:
    """Order what has arrived.

    Args:
        expert_ids: integers [records, top_k] as they arrived: by chunk, then lane of the source, then
            node of the source, then token.
        ending: int64 [ep_size, chunks] on the CPU: records from each source rank in each chunk.
        placement: of this rank.
    """
    nodes, lanes, chunks = placement.num_nodes, placement.lanes, ending.shape[1]
    arrival = ending.view(nodes, lanes, chunks).permute(2, 1, 0)
    to_plan, from_arrival = reorder_blocks(arrival, (2, 1, 0), expert_ids.device)
    local = expert_ids.index_select(0, to_plan).to(torch.int64) - placement.ep_rank * placement.local_experts
    here = (local >= 0) & (local < placement.local_experts)
    plan = plan_send(torch.where(here, local, -1), placement.local_experts)
    return Landing(
        plan=plan,
        to_expert=to_plan.index_select(0, plan.row_tokens),
        from_arrival=from_arrival,
        bags=Bags.of(plan.slot_rows.index_select(0, from_arrival)),
    )


def lengths_from_lanes(ending: Tensor, placement: Placement, chunk: int) -> tuple[int, ...]:
    """Records that reach this rank from each lane of its node in one chunk."""
    return tuple(ending[:, chunk].view(placement.num_nodes, placement.lanes).sum(0).tolist())


def lengths_from_nodes(crossing: Tensor, placement: Placement, chunk: int) -> tuple[int, ...]:
    """Records that reach this rank's lane from each node in one chunk.

    Args:
        crossing: int64 [ep_size, chunks] on the CPU: tokens of each rank for this node.
    """
    lane = placement.ep_rank % placement.lanes
    return tuple(crossing[:, chunk].view(placement.num_nodes, placement.lanes)[:, lane].tolist())
