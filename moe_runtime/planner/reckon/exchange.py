"""Dispatch and combine: how many rows go how far, and how long they fly.

A token goes to `top_k` experts in at most `num_groups_kept` groups. In `two_hop` what costs is not the
choices but the places: a row crosses the network once for each *other node* that holds one of its experts,
and the node's fast links once for each *other rank* there. `alltoall` sends a row for each choice. How many
places a token reaches depends on how the router chooses:

    any experts         every set of them alike:  places x (1 - C(experts elsewhere, k) / C(experts, k))
    limited to groups   drawn as the model chooses (`choices`): groups by their two best experts

Trained routers prefer some experts together, so measured statistics (nodes and ranks that a token reaches)
go before this reckoning where a run has them.

Ref: DSV3 §2.1.2 (node-limited routing), §3.2.2.
"""

from dataclasses import dataclass
from math import comb

from moe_runtime.config.schema import ModelConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import World
from moe_runtime.planner.reckon.choices import drawn_choices, places_reached

GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Spread:
    """Places that a token reaches, its own among them, in the mean.

    Args:
        nodes: distinct nodes; ranks: distinct ranks.
        num_nodes, num_ranks: that there are in the group of ranks that share the experts.
        choices: experts of a token.
    """

    nodes: float
    ranks: float
    num_nodes: int
    num_ranks: int
    choices: float

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
        """Rows of a token that leave its rank when each choice goes straight to its rank."""
        return self.choices * (1 - 1 / self.num_ranks)


def uniform_spread(model: ModelConfig, ep: int, ranks_per_node: int) -> Spread:
    """The spread of a router that prefers nothing.

    Args:
        ep: ranks that share the experts, a divisor of their number.
        ranks_per_node: of those ranks, joined by fast links.
    """
    num_nodes = max(1, ep // ranks_per_node)
    return Spread(
        nodes=_places_reached(model, num_nodes),
        ranks=_places_reached(model, ep),
        num_nodes=num_nodes,
        num_ranks=ep,
        choices=model.top_k,
    )


def _places_reached(model: ModelConfig, places: int) -> float:
    """Of so many places with equally many consecutive experts, those that a token reaches."""
    total, held, top_k = model.num_experts, model.num_experts // places, model.top_k
    if places == 1:
        return 1.0
    if model.num_groups_kept < model.num_groups:
        return places_reached(drawn_choices(model), held)
    return places * (1 - comb(total - held, top_k) / comb(total, top_k))


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
        two_hop: once for each node; otherwise each choice straight to its rank.
    """
    if two_hop:
        return Exchange(tokens * spread.to_other_nodes * row_bytes, tokens * spread.inside_nodes * row_bytes)
    inside = spread.num_ranks / spread.num_nodes
    near = spread.to_other_ranks * (inside - 1) / max(spread.num_ranks - 1, 1)
    far = spread.to_other_ranks - near
    return Exchange(tokens * far * row_bytes, tokens * near * row_bytes)
