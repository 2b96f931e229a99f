"""Bytes that a routing makes each contender send, counted token by token.

Written from the description of the exchanges, with plain loops and none of the dispatchers' code (two
constants of the format apart): what their own counters say must be equal to this, to the byte.

    plain, alltoall   a record for every (token, expert), to the rank of the expert
    deepspeed         to every expert from every rank as many rows as the largest such block has
    two_hop           a record for every (token, node), to the rank of that node in the source's lane;
                      from there one for every (token, rank)
    back              the same numbers of rows the other way, rows alone
    ours, before both a message of counts, to every rank

A record is laid out as a C struct would be: each field at a multiple of its item size, the whole rounded
up to the largest.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from moe_comm.control import HEADER_SIZE
from moe_comm.two_hop import DEFAULT_CHUNKS

from moe_runtime.cli.bench_comm.settings import Settings

Matrix = list[list[int]]

_WORD = 8  # bytes of a number in a message of counts
_PAYLOAD = {
    "bf16": lambda hidden: [(hidden, 2)],
    "fp8": lambda hidden: [(hidden, 1), (-(-hidden // 128), 4)],
    "fp8_pow2": lambda hidden: [(hidden, 1), (-(-hidden // 128), 1)],
}


@dataclass(frozen=True)
class Predicted:
    """Bytes that every rank sends every other, [source][destination], messages of counts included.

    Args:
        dispatch: tokens to their experts.
        combine: back again.
    """

    dispatch: Matrix
    combine: Matrix


def record_bytes(fields: Sequence[tuple[int, int]]) -> int:
    """Size of a record of (columns, item size) fields."""
    end = 0
    for columns, size in fields:
        end = -(-end // size) * size + columns * size
    largest = max(size for _, size in fields)
    return -(-end // largest) * largest


def flat_rows(expert_ids: Sequence, settings: Settings) -> Matrix:
    """Rows [source][destination] of every (token, expert); expert_ids [ranks][tokens][top_k]."""
    rows = _zeros(settings.world_size)
    for source, tokens in enumerate(expert_ids):
        for chosen in tokens:
            for expert in chosen:
                rows[source][expert // settings.local_experts] += 1
    return rows


def largest_block(expert_ids: Sequence) -> int:
    """Tokens of the rank and expert that have most in common."""
    return max(max(Counter(e for chosen in tokens for e in chosen).values()) for tokens in expert_ids)


def hop_rows(expert_ids: Sequence, settings: Settings) -> tuple[Matrix, Matrix]:
    """Rows [from][to] of the far hop and of the near hop; what stays on its rank is on the diagonal."""
    far, near = _zeros(settings.world_size), _zeros(settings.world_size)
    lanes = settings.ranks_per_node
    for source, tokens in enumerate(expert_ids):
        for chosen in tokens:
            ranks = {expert // settings.local_experts for expert in chosen}
            for node in {rank // lanes for rank in ranks}:
                far[source][node * lanes + source % lanes] += 1
            for rank in ranks:
                near[rank // lanes * lanes + source % lanes][rank] += 1
    return far, near


def predict(contender: str, expert_ids: Sequence, settings: Settings) -> Predicted:
    """What a contender sends.

    Args:
        contender: one of CONTENDERS.
        expert_ids: [ranks][tokens][top_k] numbers.
        settings: shape.
    """
    hidden, world = settings.hidden, settings.world_size
    back = record_bytes([(hidden, 2)])
    if contender == "plain":
        rows = flat_rows(expert_ids, settings)
        counts = _to_all(world, settings.local_experts * _WORD)
        return Predicted(_sum(_times(rows, hidden * 2), counts), _times(_turned(rows), hidden * 2))
    if contender == "deepspeed":
        padded = _to_all(world, settings.local_experts * largest_block(expert_ids) * hidden * 2)
        return Predicted(padded, padded)
    kind, _, wire = contender.rpartition("_") if not contender.endswith("_pow2") else _split_pow2(contender)
    payload = _PAYLOAD[wire](hidden)
    if kind == "alltoall":
        rows = flat_rows(expert_ids, settings)
        control = _to_all(world, (HEADER_SIZE + world + settings.local_experts) * _WORD)
        out = _times(rows, record_bytes([*payload, (1, 4)]))
        return Predicted(_sum(out, control), _sum(_times(_turned(rows), back), control))
    far, near = hop_rows(expert_ids, settings)
    control = _to_all(world, (HEADER_SIZE + world + 2 * DEFAULT_CHUNKS) * _WORD)
    rows = _sum(far, near)
    out = _times(rows, record_bytes([*payload, (settings.top_k, 2), (settings.top_k, 4)]))
    return Predicted(_sum(out, control), _sum(_times(_turned(rows), back), control))


def between_nodes(matrix: Matrix, settings: Settings) -> int:
    """Bytes that change node."""
    sent, _ = node_directions(matrix, settings)
    return sum(sent)


def within_nodes(matrix: Matrix, settings: Settings) -> int:
    """Bytes that change rank and stay in the node."""
    own = sum(matrix[rank][rank] for rank in range(settings.world_size))
    return sum(map(sum, matrix)) - own - between_nodes(matrix, settings)


def node_directions(matrix: Matrix, settings: Settings) -> tuple[list[int], list[int]]:
    """Bytes over the link of each node: (out, in)."""
    sent, received = [0] * settings.nodes, [0] * settings.nodes
    for source, line in enumerate(matrix):
        for destination, amount in enumerate(line):
            here, there = settings.node_of(source), settings.node_of(destination)
            if here != there:
                sent[here] += amount
                received[there] += amount
    return sent, received


def _split_pow2(contender: str) -> tuple[str, str, str]:
    kind = contender.removesuffix("_fp8_pow2")
    return kind, "_", "fp8_pow2"


def _zeros(size: int) -> Matrix:
    return [[0] * size for _ in range(size)]


def _to_all(size: int, amount: int) -> Matrix:
    """The same amount to every other rank."""
    return [[0 if source == destination else amount for destination in range(size)] for source in range(size)]


def _times(matrix: Matrix, factor: int) -> Matrix:
    return [[amount * factor for amount in line] for line in matrix]


def _turned(matrix: Matrix) -> Matrix:
    return [list(line) for line in zip(*matrix, strict=True)]


def _sum(first: Matrix, second: Matrix) -> Matrix:
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]
