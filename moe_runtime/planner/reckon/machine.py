"""Where the ranks of a layout are: which of them share a node, how rows travel between them, and how long.

    global rank = pp_rank x dp + dp_rank, node by node

so the ranks of an expert group are neighbours, and the next pipeline rank is dp ranks away.
"""

from dataclasses import dataclass

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.planner.hardware.cluster import Cluster, Link
from moe_runtime.planner.hardware.estimate import World
from moe_runtime.planner.reckon.exchange import Exchange, Spread, exchange, uniform_spread

TILE = 128
GIGA, MICRO = 1e9, 1e-6
WIDTHS = {"fp32": 4, "fp64": 8, "bf16": 2, "fp8": 2}  # of what is not cast, by precision


@dataclass(frozen=True)
class Machine:
    """A run's layout on a cluster.

    Args:
        spread: places that a token reaches; None: that of a router that prefers nothing.
    """

    config: RunConfig
    layout: ResolvedLayout
    cluster: Cluster
    world: World
    spread: Spread | None = None

    @property
    def ranks_per_node(self) -> int:
        """Ranks that fast links join."""
        return self.config.layout.ranks_per_node or self.cluster.accelerators_a_node

    @property
    def tokens(self) -> int:
        """Of a microbatch."""
        return self.config.batch.micro_batch_size * self.config.batch.seq_len

    @property
    def width(self) -> int:
        """Bytes of a value of the stream."""
        return WIDTHS[self.config.precision]

    @property
    def two_hop(self) -> bool:
        """Rows cross the network once for each node, as the dispatcher decides it."""
        if self.layout.dispatcher in ("local", "alltoall"):
            return False
        return self.layout.dispatcher == "two_hop" or suits_two_hop(
            self.config.model, self.layout.ep, self.ranks_per_node
        )

    def transfer_s(self) -> float:
        """A boundary tensor from one pipeline rank to the next."""
        near = self.layout.pp * self.layout.dp <= self.ranks_per_node
        size = self.tokens * self.config.model.hidden_size * self.width
        return (
            0.0
            if self.layout.pp == 1
            else self._over(self.cluster.fast if near else self.cluster.network, size)
        )

    def exchange_s(self, cast: bool) -> float:
        """One exchange of a microbatch in one block.

        Args:
            cast: rows go as dispatched ones (FP8 if the wire is); else as combined ones.
        """
        return self.exchange(cast).seconds(self.cluster, self.world)

    def exchange(self, cast: bool) -> Exchange:
        """Bytes of one exchange that a rank sends."""
        if self.layout.ep == 1:
            return Exchange(0.0, 0.0)
        model = self.config.model
        spread = self.spread or uniform_spread(
            model, self.layout.ep, min(self.layout.ep, self.ranks_per_node)
        )
        return exchange(spread, self.tokens, self.row_bytes(cast), self.two_hop)

    def row_bytes(self, cast: bool) -> float:
        """Of a row on the wire."""
        hidden = self.config.model.hidden_size
        wire = self.config.layout.wire
        if wire == "auto":
            wire = "fp8_pow2" if self.config.precision == "fp8" else "auto"
        tiles = -(-hidden // TILE)
        if not cast and wire in ("fp8", "fp8_pow2"):
            wire = "bf16"
        sizes = {
            "fp8": hidden + 4 * tiles,
            "fp8_pow2": hidden + tiles,
            "bf16": 2 * hidden,
            "fp32": 4 * hidden,
        }
        return sizes.get(wire, self.width * hidden)

    def _over(self, link: Link, size: float) -> float:
        """Bytes over a link, in seconds."""
        return size / (link.gbps.rate(self.world) * GIGA) + link.latency_us.burden(self.world) * MICRO


def suits_two_hop(model: ModelConfig, ep: int, ranks_per_node: int) -> bool:
    """Several whole nodes, whole routing groups on each."""
    nodes = ep // ranks_per_node
    return nodes > 1 and ep % ranks_per_node == 0 and model.num_groups % nodes == 0
