"""Which rank holds which expert: contiguous, so that a routing group never straddles a node."""

from dataclasses import dataclass

from moe_comm.errors import PlacementError


@dataclass(frozen=True)
class Placement:
    """Where the experts of one layer live within one expert-parallel group.

    Expert e lives on rank e // local_experts, in slot e % local_experts. Ranks here are those of the
    group (ep_rank), and group ranks are consecutive global ranks, node by node.

    Args:
        num_experts: routed experts of a layer; a multiple of ep_size.
        ep_size: ranks of the group.
        ep_rank: this rank within the group.
        ranks_per_node: ranks that share a machine; None means that all ranks of the group do.
        first_rank: global rank of ep_rank 0; matters only when the group begins inside a node.
        num_groups: routing groups that the experts form, in equal contiguous parts; None: not said.

    Raises:
        PlacementError: the numbers do not fit together.

    Ref: DSV3 §3.2.2
    """

    num_experts: int
    ep_size: int = 1
    ep_rank: int = 0
    ranks_per_node: int | None = None
    first_rank: int = 0
    num_groups: int | None = None

    def __post_init__(self) -> None:
        if self.num_experts < 1 or self.ep_size < 1:
            raise PlacementError(
                f"expected at least 1 expert and 1 rank, got {self.num_experts} and {self.ep_size}"
            )
        if self.num_experts % self.ep_size:
            fitting = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise PlacementError(
                f"{self.num_experts} experts do not divide over {self.ep_size} expert-parallel ranks; "
                f"choose one of {fitting} ranks"
            )
        if not 0 <= self.ep_rank < self.ep_size:
            raise PlacementError(f"expected ep_rank in 0..{self.ep_size - 1}, got {self.ep_rank}")
        if self.first_rank < 0 or (self.ranks_per_node is not None and self.ranks_per_node < 1):
            raise PlacementError(
                f"expected first_rank >= 0 and ranks_per_node >= 1, "
                f"got {self.first_rank} and {self.ranks_per_node}"
            )
        if self.num_groups is not None and (self.num_groups < 1 or self.num_experts % self.num_groups):
            raise PlacementError(
                f"expected num_groups that divides {self.num_experts} experts, got {self.num_groups}"
            )

    @property
    def local_experts(self) -> int:
        """Experts on each rank."""
        return self.num_experts // self.ep_size

    @property
    def num_nodes(self) -> int:
        """Machines that the group spans."""
        return self.node_of_rank(self.ep_size - 1) + 1

    @property
    def lanes(self) -> int:
        """Ranks of a node, if every node of the group has as many; else all ranks of the group.

        Ranks of different nodes with the same place in their node form a lane.
        """
        return self.ep_size if self.ranks_per_node is None else min(self.ranks_per_node, self.ep_size)

    @property
    def has_whole_nodes(self) -> bool:
        """Whether the group is made of complete nodes, or is within one."""
        per_node = self.ranks_per_node
        if per_node is None or self.num_nodes == 1:
            return True
        return self.ep_size % per_node == 0 and self.first_rank % per_node == 0

    def require_group(self, size: int, rank: int) -> None:
        """Refuse a group that is not the one of this placement.

        Raises:
            PlacementError: another size, or another place in it.
        """
        if (size, rank) != (self.ep_size, self.ep_rank):
            raise PlacementError(
                f"expected a group of {self.ep_size} with this rank at {self.ep_rank}, "
                f"got a group of {size} with this rank at {rank}"
            )

    def rank_of(self, expert: int) -> int:
        """The ep_rank that holds a global expert."""
        return self._known(expert) // self.local_experts

    def slot_of(self, expert: int) -> int:
        """The position of a global expert among those of its rank."""
        return self._known(expert) % self.local_experts

    def node_of(self, expert: int) -> int:
        """The node, counted from the group's first, of a global expert."""
        return self.node_of_rank(self.rank_of(expert))

    def node_of_rank(self, ep_rank: int) -> int:
        """The node, counted from the group's first, of a rank of the group."""
        if self.ranks_per_node is None:
            return 0
        return (self.first_rank + ep_rank) // self.ranks_per_node - self.first_rank // self.ranks_per_node

    def experts_of(self, ep_rank: int) -> range:
        """Global numbers of the experts of a rank, in slot order."""
        return range(ep_rank * self.local_experts, (ep_rank + 1) * self.local_experts)

    def _known(self, expert: int) -> int:
        if not 0 <= expert < self.num_experts:
            raise PlacementError(f"expected an expert in 0..{self.num_experts - 1}, got {expert}")
        return expert
