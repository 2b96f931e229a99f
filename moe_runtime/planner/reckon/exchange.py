"""Dispatch and combine: how many rows go how far, and how long they fly.

A token goes to `top_k` experts in at most `num_groups_kept` groups. What costs is not the choices but the
places: a row crosses the network once for each *other node* that holds one of its experts (`two_hop`), and
the node's fast links once for each *other rank* there. How many places a token reaches follows from the
shape of the choice if every kept set of groups, and in it every set of experts, is equally likely:

    P(a place with e experts in one group is reached) = kept / groups x (1 - C(K - e, k) / C(K, k))

with K the experts of kept groups. A place that holds whole groups sums over how many of them are kept.
Trained routers prefer some experts together, so measured statistics (nodes and ranks that a token reaches)
go before this reckoning where a run has them.

Ref: DSV3 §2.1.2 (node-limited routing), §3.2.2.
"""

from dataclasses import dataclass
from math import comb

from moe_runtime.config.schema import ModelConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import World

GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Spread:
    """Places that a token reaches, its own among them, in the mean.

    Args:
        nodes: distinct nodes; ranks: distinct ranks.
        num_nodes, num_ranks: that there are in the group of ranks that share the experts.
    """

    nodes: float
    ranks: float
    num_nodes: int
    num_ranks: int

    @property
    def to_other_nodes(self) -> float:
        """Rows of a token that cross the network in two hops; its own node is any of them alike."""
        return self.nodes * (1 - 1 / self.num_nodes)

    @property
    def inside_nodes(self) -> float:
        """Rows of a token over fast links in two hops: to every rank reached but the one that it arrives at.

        It arrives at the rank of the same place in the node, which is any of the node's alike.
        """
        return self.ranks * (1 - self.num_nodes / self.num_ranks)

    @property
    def to_other_ranks(self) -> float:
        """Rows of a token that leave its rank when each goes straight to its rank."""
        return self.ranks * (1 - 1 / self.num_ranks)


def uniform_spread(model: ModelConfig, ep: int, ranks_per_node: int) -> Spread:
    """The spread of a router that prefers nothing.

    Args:
        ep: ranks that share the experts, a divisor of their number.
        ranks_per_node: of those ranks, joined by fast links.
    """
    num_nodes = max(1, ep // ranks_per_node)
    return Spread(
        nodes=num_nodes * _reached(model, model.num_experts // num_nodes),
        ranks=ep * _reached(model, model.num_experts // ep),
        num_nodes=num_nodes,
        num_ranks=ep,
    )


def _reached(model: ModelConfig, experts: int) -> float:
    """Probability that a token reaches a place that holds so many consecutive experts."""
    groups, kept, top_k = model.num_groups, model.num_groups_kept, model.top_k
    size = model.num_experts // groups
    eligible = kept * size
    missed = [comb(max(eligible - one, 0), top_k) / comb(eligible, top_k) for one in range(experts + 1)]
    if experts < size:
        return kept / groups * (1 - missed[experts])
    held = experts // size
    ways = comb(groups, kept)
    return sum(
        comb(held, here) * comb(groups - held, kept - here) / ways * (1 - missed[here * size])
        for here in range(min(held, kept) + 1)
        if kept - here <= groups - held
    )


@dataclass(frozen=True)
class Exchange:
    """One dispatch or combine of one rank.

    Args:
        network_bytes, fast_bytes: that the rank sends over each kind of link.
    """

    network_bytes: float
    fast_bytes: float

    def seconds(self, cluster: Cluster, world: World) -> float:
        """Both kinds of links carry at the same time; the slower one tells."""
        network = self.network_bytes / (cluster.network.gbps.rate(world) * GIGA)
        fast = self.fast_bytes / (cluster.fast.gbps.rate(world) * GIGA)
        latency = cluster.network.latency_us if self.network_bytes else cluster.fast.latency_us
        if not self.network_bytes and not self.fast_bytes:
            return 0.0
        start = cluster.communication.start_us.burden(world) + latency.burden(world)
        return max(network, fast) + start * MICRO


def exchange(spread: Spread, tokens: int, row_bytes: float, two_hop: bool) -> Exchange:
    """What a rank sends of `tokens` tokens.

    Args:
        row_bytes: of a row on the wire, scales and what goes beside it included.
        two_hop: once for each node; otherwise straight to every rank.
    """
    if two_hop:
        return Exchange(tokens * spread.to_other_nodes * row_bytes, tokens * spread.inside_nodes * row_bytes)
    inside = spread.num_ranks / spread.num_nodes
    near = spread.to_other_ranks * (inside - 1) / max(spread.num_ranks - 1, 1)
    far = spread.to_other_ranks - near
    return Exchange(tokens * far * row_bytes, tokens * near * row_bytes)
