"""From what ranks measured to figures: bytes beside their prediction, time beside the links' floor."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from moe_comm.rebalance import describe_rebalance
from torch import Tensor

from moe_runtime.cli.bench_comm import analytic
from moe_runtime.cli.bench_comm.routing import Routing, make_routing, max_over_mean
from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.testbed.links import HEADER_BYTES

PHASES = ("dispatch", "combine")
# Nodes, ranks of a node, spare slots: as many ranks as make an expert's load felt. Ref: DSV3 §3.4.1
_REBALANCED = ((4, 8, 32), (8, 8, 64))


def write_routings(settings: Settings, folder: Path) -> dict[str, Routing]:
    """Make the routings and leave them where ranks read them."""
    routings = {name: make_routing(name, settings) for name in settings.routings}
    for name, routing in routings.items():
        arrays = {"expert_ids": routing.expert_ids.numpy(), "weights": routing.weights.numpy()}
        np.savez(folder / f"{name}.npz", **arrays)  # type: ignore[arg-type]
    return routings


def summarise_exchange(
    said: list[dict[str, Any]], routings: dict[str, Routing], settings: Settings
) -> list[dict[str, Any]]:
    """One entry for each routing.

    Args:
        said: of each rank, by `run_exchange`.
        routings: as they were made.
        settings: of the measurement.
    """
    entries = []
    for name, routing in routings.items():
        of_ranks = [rank[name] for rank in said]
        plain = "plain" if "plain" in of_ranks[0] else next(iter(of_ranks[0]))
        lines = [_contender(way, plain, of_ranks, routing, settings) for way in of_ranks[0]]
        by_key = {line["contender"]: line for line in lines}
        for line in lines:
            _compare(line, by_key[plain])
        entries.append({"routing": name, **_loads(routing, settings), "contenders": lines})
    return entries


def _contender(
    name: str, plain: str, of_ranks: list[dict[str, Any]], routing: Routing, settings: Settings
) -> dict[str, Any]:
    measured = [rank[name] for rank in of_ranks]
    skipped = 1 if settings.rate_mbit is None else 0  # the first round warms up
    rounds = range(skipped, len(measured[0]))
    seconds = _seconds(measured, rounds)
    line: dict[str, Any] = {
        "contender": name,
        "s": statistics.median(seconds),
        "s_low": min(seconds),
        "s_high": max(seconds),
        "time": _against(seconds, _seconds([rank[plain] for rank in of_ranks], rounds)),
        "cpu_s": statistics.median(
            sum(rank[turn][phase]["cpu_s"] for rank in measured for phase in PHASES) for turn in rounds
        ),
        "error": max(rank[turn]["error"] for rank in measured for turn in rounds),
    }
    if "raw" in of_ranks[0]:
        line["time_over_raw"] = _against(seconds, _seconds([rank["raw"] for rank in of_ranks], rounds))
    if name == "raw":
        return line
    predicted = analytic.predict(name, routing.expert_ids.tolist(), settings)
    floor = 0.0
    for phase in PHASES:
        matrix = getattr(predicted, phase)
        line[phase] = _bytes(measured, phase, matrix, settings)
        line[phase]["s"] = statistics.median(_slowest(measured, turn, phase) for turn in rounds)
        if settings.rate_mbit is not None:
            line[phase]["floor_s"] = _floor_s(matrix, settings)
            floor += line[phase]["floor_s"]
    if settings.rate_mbit is not None:
        line["floor_s"], line["over_floor"] = floor, line["s"] / floor
    return line


def _seconds(measured: list[Any], rounds: range) -> list[float]:
    """Dispatch and combine of each round."""
    return [sum(_slowest(measured, turn, phase) for phase in PHASES) for turn in rounds]


def _against(seconds: list[float], others: list[float]) -> dict[str, float]:
    """Ratio to another contender, round by round."""
    ratios = [ours / theirs for ours, theirs in zip(seconds, others, strict=True)]
    return {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def _slowest(measured: list[Any], turn: int, phase: str) -> float:
    """A phase takes as long as its slowest rank."""
    return max(rank[turn][phase]["s"] for rank in measured)


def _floor_s(matrix: analytic.Matrix, settings: Settings) -> float:
    """Seconds of the busiest link direction at its rate."""
    assert settings.rate_mbit is not None
    sent, received = analytic.node_directions(matrix, settings)
    return max(*sent, *received) * 8 / (settings.rate_mbit * 1e6)


def _bytes(measured: list[Any], phase: str, matrix: analytic.Matrix, settings: Settings) -> dict[str, Any]:
    """Bytes of all ranks together, of one round (all are alike)."""
    last = [rank[-1][phase] for rank in measured]
    counted = [sum(rank["sent"][way] for rank in last) for way in (0, 1)]
    predicted = [analytic.within_nodes(matrix, settings), analytic.between_nodes(matrix, settings)]
    line: dict[str, Any] = {
        "intra_bytes": counted[0],
        "inter_bytes": counted[1],
        "analytic_intra_bytes": predicted[0],
        "analytic_inter_bytes": predicted[1],
        "is_as_predicted": counted == predicted,
    }
    if settings.rate_mbit is not None:
        of_nodes = [rank["link"] for rank in last[:: settings.ranks_per_node]]
        line["link_bytes"] = sum(node["sent_bytes"] for node in of_nodes)
        line["link_packets"] = sum(node["sent_packets"] for node in of_nodes)
        line["link_over_counted"] = line["link_bytes"] / counted[1] - 1
        line["header_share"] = line["link_packets"] * HEADER_BYTES / counted[1]
    return line


def _compare(line: dict[str, Any], plain: dict[str, Any]) -> None:
    """Bytes between nodes over those of the plain exchange."""
    for phase in PHASES:
        if phase in line and plain[phase]["inter_bytes"]:
            line[phase]["inter_ratio"] = line[phase]["inter_bytes"] / plain[phase]["inter_bytes"]


def _loads(routing: Routing, settings: Settings) -> dict[str, Any]:
    """How uneven the routing is, and what re-placing experts would make of it."""
    loads = routing.loads(settings.num_experts)
    of_ranks = loads.view(settings.world_size, -1).sum(1)
    figures: dict[str, Any] = {"expert_load": max_over_mean(loads), "rank_load": max_over_mean(of_ranks)}
    figures["rebalance"] = [
        _rebalance(loads, settings, nodes, ranks, replicas)
        for nodes, ranks, replicas in _REBALANCED
        if (settings.num_experts + replicas) % (nodes * ranks) == 0
    ]
    return figures


def _rebalance(loads: Tensor, settings: Settings, nodes: int, ranks: int, replicas: int) -> dict[str, Any]:
    """What re-placing experts by these loads would gain on nodes x ranks, with spare slots."""
    gain = describe_rebalance(
        loads.view(1, -1),
        settings.num_experts + replicas,
        ranks_per_node=ranks,
        num_nodes=nodes,
        num_groups=settings.num_groups,
    )
    shape = {"nodes": nodes, "ranks_per_node": ranks, "replicas": replicas, "form": gain.form}
    return shape | {"before": gain.before, "after": gain.after, "bound": gain.bound}
