"""Rows and bytes of an exchange whose routing is known, counted token by token.

    alltoall   a row for every (token, expert), to the rank of the expert
    two_hop    a row for every (token, node), to the rank of that node in the source's lane;
               from there one for every (token, rank)
    back       the same rows the other way

Plain loops over Python numbers. -1 is no choice, as in the dispatchers.

Ref: DSV3 §3.2.2
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moe_runtime.planner.reckon.wire import OUTWARD, Operation, RowFormat

# Choices of every rank: [ranks][tokens][top_k]
ExpertIds = Sequence[Sequence[Sequence[int]]]
# Amounts that every rank sends every other: [from][to]; what stays on its rank is on the diagonal
Matrix = list[list[int]]


@dataclass(frozen=True)
class Counted:
    """What one rank sends in one operation, by distance; the fields of a dispatcher's own counters."""

    rows_self: int
    rows_intra: int
    rows_inter: int
    bytes_intra: int
    bytes_inter: int
    meta_bytes_intra: int
    meta_bytes_inter: int
    control_bytes_intra: int
    control_bytes_inter: int

    @property
    def all_bytes_intra(self) -> int:
        """Everything that stays in the node."""
        return self.bytes_intra + self.meta_bytes_intra + self.control_bytes_intra

    @property
    def all_bytes_inter(self) -> int:
        """Everything that leaves the node."""
        return self.bytes_inter + self.meta_bytes_inter + self.control_bytes_inter


def flat_rows(expert_ids: ExpertIds, local_experts: int) -> Matrix:
    """Rows of every (token, expert)."""
    rows = zeros(len(expert_ids))
    for source, tokens in enumerate(expert_ids):
        for chosen in tokens:
            for expert in chosen:
                if expert >= 0:
                    rows[source][expert // local_experts] += 1
    return rows


def hop_rows(expert_ids: ExpertIds, local_experts: int, lanes: int) -> tuple[Matrix, Matrix]:
    """Rows of the far hop and of the near hop.

    Args:
        lanes: ranks of a node.
    """
    far, near = zeros(len(expert_ids)), zeros(len(expert_ids))
    for source, tokens in enumerate(expert_ids):
        for chosen in tokens:
            ranks = {expert // local_experts for expert in chosen if expert >= 0}
            for node in {rank // lanes for rank in ranks}:
                far[source][node * lanes + source % lanes] += 1
            for rank in ranks:
                near[rank // lanes * lanes + source % lanes][rank] += 1
    return far, near


def count_exchange(
    form: RowFormat, operation: Operation, expert_ids: ExpertIds, ranks_a_node: int, confirmed: bool = False
) -> list[Counted]:
    """What every rank of an expert-parallel group sends in one operation.

    Args:
        form: records.
        operation: of dispatch, combine and their backwards.
        expert_ids: of the group's ranks.
        ranks_a_node: consecutive ranks that fast links join.
        confirmed: ranks agree before each operation; training does only before a dispatch.
    """
    size = len(expert_ids)
    local_experts = form.num_experts // size
    if form.kind == "alltoall":
        hops = [flat_rows(expert_ids, local_experts)]
    else:
        hops = list(hop_rows(expert_ids, local_experts, ranks_a_node))
    rows = [[sum(amounts) for amounts in zip(*lines, strict=True)] for lines in zip(*hops, strict=True)]
    if operation not in OUTWARD:
        rows = turned(rows)
    message = form.counts_bytes(size) if operation == "dispatch" or confirmed else 0
    record = form.record(operation)
    return [
        _counted(line, rank, ranks_a_node, record.payload, record.beside, message)
        for rank, line in enumerate(rows)
    ]


def _counted(
    line: list[int], rank: int, ranks_a_node: int, payload: int, beside: int, message: int
) -> Counted:
    first = rank // ranks_a_node * ranks_a_node
    peers = len(line[first : first + ranks_a_node])
    near = sum(line[first : first + ranks_a_node]) - line[rank]
    far = sum(line) - near - line[rank]
    return Counted(
        rows_self=line[rank],
        rows_intra=near,
        rows_inter=far,
        bytes_intra=near * payload,
        bytes_inter=far * payload,
        meta_bytes_intra=near * beside,
        meta_bytes_inter=far * beside,
        control_bytes_intra=message * (peers - 1),
        control_bytes_inter=message * (len(line) - peers),
    )


def zeros(size: int) -> Matrix:
    """Nothing sent."""
    return [[0] * size for _ in range(size)]


def turned(matrix: Matrix) -> Matrix:
    """The same rows the other way."""
    return [list(line) for line in zip(*matrix, strict=True)]
