"""From the options of the command to what is measured: the defaults of each part."""

from typing import Any

from moe_runtime.cli.bench_comm.settings import CONTENDERS, Settings
from moe_runtime.errors import ConfigError

_OURS = ("alltoall_bf16", "two_hop_bf16", "two_hop_fp8")


def plan(part: str, links: str, given: dict[str, Any]) -> list[Settings]:
    """What to measure, one after the other.

    Args:
        part: "exchange", "layer" or "overlap".
        links: "veth" or "none".
        given: options by name of a field of Settings; None where the user said nothing.

    Raises:
        ConfigError: options that do not go together.
    """
    if links not in ("veth", "none"):
        raise ConfigError(f"bench comm: expected --links veth or none, got {links!r}")
    said = {key: value for key, value in given.items() if value is not None}
    if links == "none" and "rate_mbit" in said:
        raise ConfigError("bench comm: --rate is that of links, and --links none has none; leave one out")
    if part == "layer":
        return _layers(said)
    if part == "overlap":
        # Slow enough that packing rows and imitating links, which take the processor too, are small beside.
        defaults: dict[str, Any] = {"nodes": 2, "ranks_per_node": 1, "rate_mbit": 25, "contenders": _OURS}
        defaults |= {"rounds": 3, "routings": ("balanced",)}
    elif links == "none":
        defaults = {"nodes": 1, "ranks_per_node": 2, "rounds": 15}
    else:
        defaults = {}
    if links == "none":
        defaults |= {"rate_mbit": None}
    merged: dict[str, Any] = {"part": part, **defaults, **said}
    if part == "exchange":
        merged |= {"contenders": _contenders(merged.get("nodes", Settings.nodes), links)}
    return [Settings(**merged)]


def _contenders(nodes: int, links: str) -> tuple[str, ...]:
    """The floor where nothing else bounds the exchange; two hops where there are two nodes."""
    fitting = [name for name in CONTENDERS if nodes > 1 or not name.startswith("two_hop")]
    return (*fitting, "raw") if links == "none" else tuple(fitting)


def _layers(said: dict[str, Any]) -> list[Settings]:
    shape: dict[str, Any] = {"hidden": 1024, "expert_width": 256, "num_experts": 32, "top_k": 4, "rounds": 9}
    shape |= {"num_groups": 1, "groups_kept": 1, "routings": ("balanced", "natural"), "rate_mbit": None}
    worlds = (said.pop("ranks_per_node"),) if "ranks_per_node" in said else (4, 2)
    if said.pop("nodes", 1) != 1:
        raise ConfigError("bench comm: --layer runs on one node; leave --nodes out")
    return [Settings(part="layer", nodes=1, ranks_per_node=ranks, **(shape | said)) for ranks in worlds]
