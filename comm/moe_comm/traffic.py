"""Counts what a dispatcher sends: rows and bytes, within a node and between nodes.

Only what this rank sends is counted, so the sum over ranks counts every byte once. Rows that stay on
their rank cost no network and are counted apart. Counting adds integers that are known anyway: it
waits for nothing. In `two_hop` a row that changes node and then rank within it is counted at each hop.
"""

import threading
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
        bytes_intra: bytes of rows_intra, scales included.
        bytes_inter: bytes of rows_inter, scales included.
        meta_bytes_intra: what travels beside the rows (expert ids, gate weights, padding), within the node.
        meta_bytes_inter: the same, between nodes.
        control_bytes_intra: bytes of the messages of counts that precede rows, within the node.
        control_bytes_inter: the same, between nodes.
    """

    rows_self: int = 0
    rows_intra: int = 0
    rows_inter: int = 0
    bytes_intra: int = 0
    bytes_inter: int = 0
    meta_bytes_intra: int = 0
    meta_bytes_inter: int = 0
    control_bytes_intra: int = 0
    control_bytes_inter: int = 0

    @property
    def all_bytes_intra(self) -> int:
        """Everything sent within the node."""
        return self.bytes_intra + self.meta_bytes_intra + self.control_bytes_intra

    @property
    def all_bytes_inter(self) -> int:
        """Everything sent to other nodes."""
        return self.bytes_inter + self.meta_bytes_inter + self.control_bytes_inter

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))


class TrafficMeter:
    """Adds up the traffic of one dispatcher; any of its threads may count.

    Args:
        placement: says which ranks share this one's node.
    """

    def __init__(self, placement: Placement) -> None:
        self._rank = placement.ep_rank
        self._nodes = [placement.node_of_rank(rank) for rank in range(placement.ep_size)]
        self._lock = threading.Lock()
        self._total = Traffic()

    def count_rows(
        self, splits: Sequence[int], payload_bytes: int, meta_bytes: int, ranks: Sequence[int]
    ) -> None:
        """Count rows sent.

        Args:
            splits: how many go to each of `ranks`.
            payload_bytes: of one row.
            meta_bytes: of one row.
            ranks: of the group.
        """
        stay, intra, inter = self._by_distance(splits, ranks)
        self._add(
            Traffic(
                stay,
                intra,
                inter,
                intra * payload_bytes,
                inter * payload_bytes,
                intra * meta_bytes,
                inter * meta_bytes,
            )
        )

    def count_control(self, message_bytes: int) -> None:
        """Count one control message of this size to every other rank."""
        ranks = range(len(self._nodes))
        _, intra, inter = self._by_distance([message_bytes] * len(ranks), ranks)
        self._add(Traffic(control_bytes_intra=intra, control_bytes_inter=inter))

    def snapshot(self, *, reset: bool = False) -> Traffic:
        """What was sent since the last reset."""
        with self._lock:
            total = self._total
            if reset:
                self._total = Traffic()
        return total

    def _by_distance(self, amounts: Sequence[int], ranks: Sequence[int]) -> tuple[int, int, int]:
        here = self._nodes[self._rank]
        stay = intra = inter = 0
        for amount, rank in zip(amounts, ranks, strict=True):
            if rank == self._rank:
                stay += amount
            elif self._nodes[rank] == here:
                intra += amount
            else:
                inter += amount
        return stay, intra, inter

    def _add(self, traffic: Traffic) -> None:
        with self._lock:
            self._total += traffic
