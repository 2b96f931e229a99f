"""Counts what a dispatcher sends: rows and bytes, within a node and between nodes.

Only what this rank sends is counted, so the sum over ranks counts every byte once. Rows that stay on
their rank cost no network and are counted apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from moe_comm.placement import Placement


@dataclass(frozen=True)
class Traffic:
    """What one rank has sent.

    Args:
        rows_self: rows that stayed on this rank.
        rows_intra: rows sent to other ranks of this node.
        rows_inter: rows sent to other nodes.
        bytes_intra: bytes of rows_intra.
        bytes_inter: bytes of rows_inter.
        control_bytes_intra: bytes of the count messages that precede rows, within the node.
        control_bytes_inter: the same, between nodes.
    """

    rows_self: int = 0
    rows_intra: int = 0
    rows_inter: int = 0
    bytes_intra: int = 0
    bytes_inter: int = 0
    control_bytes_intra: int = 0
    control_bytes_inter: int = 0

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))


class TrafficMeter:
    """Adds up the traffic of one dispatcher.

    Args:
        placement: says which ranks share this one's node.
    """

    def __init__(self, placement: Placement) -> None:
        own_node = placement.node_of_rank(placement.ep_rank)
        self._self = placement.ep_rank
        self._intra = tuple(
            rank
            for rank in range(placement.ep_size)
            if rank != self._self and placement.node_of_rank(rank) == own_node
        )
        self._inter = tuple(
            rank for rank in range(placement.ep_size) if placement.node_of_rank(rank) != own_node
        )
        self._total = Traffic()

    def count_rows(self, splits: Sequence[int], row_bytes: int) -> None:
        """Count rows sent, given how many go to each rank and the bytes of one."""
        intra = sum(splits[rank] for rank in self._intra)
        inter = sum(splits[rank] for rank in self._inter)
        self._total += Traffic(splits[self._self], intra, inter, intra * row_bytes, inter * row_bytes)

    def count_control(self, message_bytes: int) -> None:
        """Count one control message of this size to every other rank."""
        self._total += Traffic(
            control_bytes_intra=len(self._intra) * message_bytes,
            control_bytes_inter=len(self._inter) * message_bytes,
        )

    def snapshot(self, *, reset: bool = False) -> Traffic:
        """What was sent since the last reset."""
        total = self._total
        if reset:
            self._total = Traffic()
        return total
