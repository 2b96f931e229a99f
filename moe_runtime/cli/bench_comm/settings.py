"""What one call of the benchmark measures: given on the command line, carried to every rank as JSON."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from moe_runtime.errors import ConfigError

ROUTINGS = ("balanced", "natural", "adversarial")
CONTENDERS = ("plain", "deepspeed", "alltoall_bf16", "two_hop_bf16", "two_hop_fp8", "two_hop_fp8_pow2")
PARTS = ("exchange", "layer", "overlap")
NATURAL_MAX_OVER_MEAN = 2.0


@dataclass(frozen=True)
class Settings:
    """One measurement.

    Args:
        part: what is run: "exchange", "layer" or "overlap".
        nodes: machines, or network namespaces that stand for them.
        ranks_per_node: processes on each.
        rate_mbit: of every link, each way, in 10^6 bit/s; None: no links, all on loopback.
        hidden: width of a row.
        tokens: of each rank.
        num_experts: routed experts in all.
        num_groups: routing groups of them.
        groups_kept: groups that a token may choose from.
        top_k: experts of a token.
        expert_width: inner width of an expert; only the layer has experts.
        rounds: times that each contender is measured, in turn.
        routings: some of ROUTINGS.
        contenders: some of CONTENDERS, and "raw" where there are no links.
        seed: of routings, tokens and weights.

    Raises:
        ConfigError: the numbers do not fit together.
    """

    part: str = "exchange"
    nodes: int = 4
    ranks_per_node: int = 2
    rate_mbit: int | None = 100
    hidden: int = 2048
    tokens: int = 1024
    num_experts: int = 256
    num_groups: int = 8
    groups_kept: int = 4
    top_k: int = 8
    expert_width: int = 0
    rounds: int = 3
    routings: tuple[str, ...] = ROUTINGS
    contenders: tuple[str, ...] = CONTENDERS
    seed: int = 1

    def __post_init__(self) -> None:
        if self.num_experts % self.world_size:
            raise ConfigError(
                f"bench comm: expected nodes x ranks that divide {self.num_experts} experts, "
                f"got {self.nodes} x {self.ranks_per_node} = {self.world_size}"
            )
        if self.part == "exchange" and self.nodes > 1 and self.num_groups % self.nodes:
            raise ConfigError(
                f"bench comm: expected nodes that divide {self.num_groups} routing groups, got {self.nodes}"
            )
        unknown = [name for name in self.routings if name not in ROUTINGS]
        if unknown:
            raise ConfigError(f"bench comm: expected a routing of {', '.join(ROUTINGS)}, got {unknown[0]!r}")

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def local_experts(self) -> int:
        """Experts of each rank."""
        return self.num_experts // self.world_size

    def node_of(self, rank: int) -> int:
        """The node of a rank."""
        return rank // self.ranks_per_node

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Settings":
        """The inverse of `to_plain`, lists made tuples again."""
        fixed: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fixed)
