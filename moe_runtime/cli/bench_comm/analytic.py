"""Bytes that a routing makes each contender send, counted token by token.

Rows and records of ours are the planner's (`planner.reckon.routed`, `wire`), written with none of the
dispatchers' code: what their own counters say must be equal to this, to the byte. Beside them:

    plain       a row for every (token, expert), after its counts
    deepspeed   to every expert from every rank as many rows as the largest such block has
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.planner.reckon.routed import Matrix, flat_rows, hop_rows, turned
from moe_runtime.planner.reckon.wire import WORD, Operation, RowFormat


@dataclass(frozen=True)
class Predicted:
    """Bytes that every rank sends every other, [source][destination], messages of counts included.

    Args:
        dispatch: tokens to their experts.
        combine: back again.
    """

    dispatch: Matrix
    combine: Matrix


def largest_block(expert_ids: Sequence) -> int:
    """Tokens of the rank and expert that have most in common."""
    return max(max(Counter(e for chosen in tokens for e in chosen).values()) for tokens in expert_ids)


def predict(contender: str, expert_ids: Sequence, settings: Settings) -> Predicted:
    """What a contender sends.

    Args:
        contender: one of CONTENDERS.
        expert_ids: [ranks][tokens][top_k] numbers.
        settings: shape.
    """
    hidden, world = settings.hidden, settings.world_size
    if contender == "plain":
        rows = flat_rows(expert_ids, settings.local_experts)
        counts = _to_all(world, settings.local_experts * WORD)
        return Predicted(_sum(_times(rows, hidden * 2), counts), _times(turned(rows), hidden * 2))
    if contender == "deepspeed":
        padded = _to_all(world, settings.local_experts * largest_block(expert_ids) * hidden * 2)
        return Predicted(padded, padded)
    form = _form(contender, settings)
    return Predicted(
        _matrix(form, "dispatch", expert_ids, settings), _matrix(form, "combine", expert_ids, settings)
    )


def _form(contender: str, settings: Settings) -> RowFormat:
    """Records of one of ours, by its name: kind and wire."""
    kind: Literal["alltoall", "two_hop"] = "two_hop" if contender.startswith("two_hop") else "alltoall"
    wire = contender.removeprefix(f"{kind}_")
    return RowFormat(kind, wire, settings.hidden, settings.top_k, settings.num_experts)


def _matrix(form: RowFormat, operation: Operation, expert_ids: Sequence, settings: Settings) -> Matrix:
    """Bytes of one operation, the message that precedes it included."""
    local = settings.local_experts
    if form.kind == "alltoall":
        rows = flat_rows(expert_ids, local)
    else:
        rows = _sum(*hop_rows(expert_ids, local, settings.ranks_per_node))
    out = rows if operation == "dispatch" else turned(rows)
    counts = _to_all(settings.world_size, form.counts_bytes(settings.world_size))
    return _sum(_times(out, form.record(operation).size), counts)


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


def _to_all(size: int, amount: int) -> Matrix:
    """The same amount to every other rank."""
    return [[0 if source == destination else amount for destination in range(size)] for source in range(size)]


def _times(matrix: Matrix, factor: int) -> Matrix:
    return [[amount * factor for amount in line] for line in matrix]


def _sum(first: Matrix, second: Matrix) -> Matrix:
    return [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(first, second, strict=True)]
