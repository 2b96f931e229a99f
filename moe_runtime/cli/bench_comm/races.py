"""From what ranks measured in the races of layers and of overlap to a line for each."""

import statistics
from typing import Any

from moe_runtime.cli.bench_comm.settings import Settings


def summarise_layer(said: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """One line for each routing out of what all ranks said; a step takes as long as its slowest rank."""
    lines = []
    for routing in settings.routings:
        each = {
            name: [max(rank[routing][name][turn]["s"] for rank in said) for turn in range(settings.rounds)]
            for name in ("ours", "deepspeed")
        }
        ratios = [theirs / ours for ours, theirs in zip(each["ours"], each["deepspeed"], strict=True)]
        lines.append(
            {
                "routing": routing,
                "ranks": settings.world_size,
                "load": said[0][routing]["load"],
                "difference": max(rank[routing]["difference"] for rank in said),
                "ours_s": statistics.median(each["ours"]),
                "deepspeed_s": statistics.median(each["deepspeed"]),
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
            }
        )
    return lines


def summarise_overlap(said: list[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """One line for each contender and operation; a phase takes as long as its slowest rank."""
    lines = []
    for name in settings.contenders:
        for operation in ("dispatch", "combine"):
            turns = [
                {
                    key: max(rank[name][operation][turn][key] for rank in said)
                    for key in said[0][name][operation][0]
                }
                for turn in range(settings.rounds)
            ]
            ratios = [turn["pair"] / max(turn["exchange"], turn["compute"]) for turn in turns]
            medians = {f"{key}_s": statistics.median(turn[key] for turn in turns) for key in turns[0]}
            spread = {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
            lines.append({"contender": name, "operation": operation, **medians, **spread})
    return lines
