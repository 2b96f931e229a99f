"""A run's layout on a cluster: which ranks share a node, and how long what they send is on its way.

    global rank = pp_rank x dp + dp_rank, node by node

so the ranks of an expert group are neighbours, and the next pipeline rank is dp ranks away. Bytes are those
of `traffic`; both kinds of links carry at the same time, and the slower one tells.
"""

from dataclasses import dataclass
from functools import cached_property

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.estimate import World
from moe_runtime.planner.reckon.exchange import Exchange, Spread
from moe_runtime.planner.reckon.traffic import (
    Sent,
    StepTraffic,
    domain_ranks,
    layer_traffic,
    step_traffic,
)
from moe_runtime.planner.reckon.wire import ITEM_BYTES, Operation

GIGA, MICRO = 1e9, 1e-6


@dataclass(frozen=True)
class Machine:
    """A run on a cluster.

    Args:
        world: which end of the cluster's ranges.
        spread: places that a token reaches, measured; None: those of a router that prefers nothing.
    """

    config: RunConfig
    layout: ResolvedLayout
    cluster: Cluster
    world: World
    spread: Spread | None = None

    @property
    def ranks_per_node(self) -> int:
        """Ranks that fast links join."""
        given = self.config.layout.ranks_per_node
        return given or domain_ranks(self.cluster.accelerators_a_node, self.layout.ep)

    @property
    def num_nodes(self) -> int:
        """Nodes that the run needs."""
        return -(-self.layout.world_size // self.ranks_per_node)

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.config.batch.micro_batch_size * self.config.batch.seq_len

    @property
    def transfer_s(self) -> float:
        """A boundary tensor from one pipeline rank to the next; over the network if any lane needs it."""
        if self.layout.pp == 1:
            return 0.0
        size = self.tokens * self.config.model.hidden_size * ITEM_BYTES[self.config.precision]
        near = self.layout.world_size <= self.ranks_per_node
        latency = (self.cluster.fast if near else self.cluster.network).latency_us.burden(self.world)
        return self.carry_s(Sent(fast=size) if near else Sent(network=size)) + latency * MICRO

    def exchange_s(self, operation: Operation) -> float:
        """One exchange of a microbatch in one block."""
        sent = self._exchanges[operation]
        return Exchange(sent.network, sent.fast).seconds(self.cluster, self.world)

    def carry_s(self, sent: Sent) -> float:
        """Large messages, without what starts them."""
        network = sent.network / (self.cluster.network.gbps.rate(self.world) * GIGA)
        return max(network, sent.fast / (self.cluster.fast.gbps.rate(self.world) * GIGA))

    def step_traffic(self, rank: int) -> StepTraffic:
        """What a pipeline rank sends in a step."""
        return step_traffic(self.config, self.layout, rank, self.ranks_per_node, self.spread)

    @cached_property
    def _exchanges(self) -> dict[str, Sent]:
        return layer_traffic(self.config, self.layout.ep, self.ranks_per_node, self.tokens, self.spread)
