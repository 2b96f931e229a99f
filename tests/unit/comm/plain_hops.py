"""What one hop and two hops do to numbers, and what they send: plain loops, one token at a time.

The slow oracle beside `moe_comm.reference`: that one knows the meaning of an exchange (which rows, in
which order, summed in at least FP32); this one also says where values are rounded, where the wire codec
is applied and which copies cross which link. It knows nothing of lanes, chunks or indices.

Ref: DSV3 §3.2.2, §3.3.3
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from moe_comm.wire.codec import WireCodec
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where experts are.

    Args:
        ranks: of the group.
        local_experts: of a rank.
        ranks_per_node: consecutive ranks.
    """

    ranks: int
    local_experts: int
    ranks_per_node: int

    def rank_of(self, expert: int) -> int:
        """The rank of an expert."""
        return expert // self.local_experts

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.ranks_per_node

    def stops(self, ids: Sequence[int]) -> dict[int, dict[int, list[int]]]:
        """Choices of one token by node and rank, nodes and ranks ascending."""
        stops: dict[int, dict[int, list[int]]] = {}
        for rank in sorted({self.rank_of(expert) for expert in ids if expert >= 0}):
            choices = [choice for choice, expert in enumerate(ids) if expert >= 0]
            here = [choice for choice in choices if self.rank_of(ids[choice]) == rank]
            stops.setdefault(self.node_of(rank), {})[rank] = here
        return stops


def through(codec: WireCodec, rows: Tensor) -> Tensor:
    """Rows [n, hidden] as they come out at the other end of a wire."""
    return codec.decode(codec.encode(rows), rows.dtype)


def rounded(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round a sum once: to nearest, and BF16's exact ties away from zero, as sums on a CPU are."""
    if dtype != torch.bfloat16 or total.dtype != torch.float32:
        return total.to(dtype)
    bits = total.contiguous().view(torch.int32)
    return ((bits + 0x8000) & ~0xFFFF).view(torch.float32).to(dtype)


def sum_in_order(rows: Sequence[Tensor], hidden: int, dtype: torch.dtype) -> Tensor:
    """Sum of rows [hidden], first to last, in at least FP32, rounded once."""
    total = torch.zeros(hidden, dtype=torch.promote_types(dtype, torch.float32))
    for row in rows:
        total = total + row.to(total.dtype)
    return rounded(total, dtype)


def flat_sums(copies: Mapping[tuple[int, int], Tensor], expert_ids: Tensor, codec: WireCodec) -> list[Tensor]:
    """What `combine` of one hop gives for each token of one rank.

    Args:
        copies: what the expert of (token, choice) returns, [hidden].
        expert_ids: int64 [tokens, top_k].
        codec: of the way back.
    """
    results = []
    for token, ids in enumerate(expert_ids.tolist()):
        rows = [copies[token, choice] for choice, expert in enumerate(ids) if expert >= 0]
        results.append([through(codec, row[None])[0] for row in rows])
    return _summed(results, copies)


def two_hop_sums(
    copies: Mapping[tuple[int, int], Tensor], expert_ids: Tensor, codec: WireCodec, layout: Layout
) -> list[Tensor]:
    """What `combine` of two hops gives: sums per rank, per node and in all, each written on the wire."""
    results = []
    for token, ids in enumerate(expert_ids.tolist()):
        from_nodes = []
        for by_rank in layout.stops(ids).values():
            from_ranks = []
            for choices in by_rank.values():
                rows = [copies[token, choice] for choice in choices]
                partial = sum_in_order(rows, rows[0].numel(), rows[0].dtype)
                from_ranks.append(through(codec, partial[None])[0])
            partial = sum_in_order(from_ranks, from_ranks[0].numel(), from_ranks[0].dtype)
            from_nodes.append(through(codec, partial[None])[0])
        results.append(from_nodes)
    return _summed(results, copies)


def _summed(rows_of_tokens: list[list[Tensor]], copies: Mapping[tuple[int, int], Tensor]) -> list[Tensor]:
    """A token without rows gives zeros like any row; without any row at all there is nothing to say."""
    if not copies:
        return []
    like = next(iter(copies.values()))
    return [sum_in_order(rows, like.numel(), like.dtype) for rows in rows_of_tokens]


@dataclass
class Sent:
    """Rows that one rank sends in one direction: to itself, within its node, to other nodes."""

    own: int = 0
    intra: int = 0
    inter: int = 0

    def add(self, layout: Layout, source: int, destination: int) -> None:
        """Count one row."""
        if source == destination:
            self.own += 1
        elif layout.node_of(source) == layout.node_of(destination):
            self.intra += 1
        else:
            self.inter += 1


def rows_sent(
    kind: str, expert_ids: Sequence[Tensor], layout: Layout, rank: int, *, back: bool = False
) -> Sent:
    """Rows that a rank sends in one dispatch, or in one combine (back), over all hops.

    Args:
        kind: alltoall or two_hop.
        expert_ids: int64 [tokens, top_k] of each rank.
        layout: where experts are.
        rank: whose rows are counted.
        back: the way of combine.
    """
    legs: list[tuple[int, int]] = []
    for source, ids in enumerate(expert_ids):
        for chosen in ids.tolist():
            if kind == "alltoall":
                legs += [(source, layout.rank_of(expert)) for expert in chosen if expert >= 0]
                continue
            for node, by_rank in layout.stops(chosen).items():
                forwarder = node * layout.ranks_per_node + source % layout.ranks_per_node
                legs.append((source, forwarder))
                legs += [(forwarder, destination) for destination in by_rank]
    sent = Sent()
    for source, destination in legs:
        first, second = (destination, source) if back else (source, destination)
        if first == rank:
            sent.add(layout, first, second)
    return sent


def record_bytes(*fields: tuple[int, int]) -> int:
    """Bytes of a record: each field where its items may lie, the whole a multiple of the largest item.

    Args:
        fields: (bytes of an item, items).
    """
    end = 0
    for size, items in fields:
        while end % size:
            end += 1
        end += size * items
    while any(end % size for size, _ in fields):
        end += 1
    return end
