"""FP8 against BF16 arithmetic: the table of the runs that `benchmarks/fp8_loss.py` made."""

from pathlib import Path
from typing import Any

from moe_runtime.evaluation.intervals import Interval, mean_interval
from moe_runtime.metrics.jsonl import read_jsonl

TOKENS_OF_SEQUENCE = 128
AGAINST = "bf16"


def arithmetic_table(file: Path) -> str:
    """Markdown: each variant's loss relative to BF16 of the same seed, from common weights and from scratch.

    Args:
        file: lines with variant, seed, steps, batch, warm and loss (mean of the last 200 steps).
    """
    runs = list(read_jsonl(file))
    lines = [
        "| begins with | variant | seeds | loss against BF16 of the same seed |",
        "| --- | --- | --- | --- |",
    ]
    for warm in sorted({run.get("warm", 0) for run in runs}, reverse=True):
        mine = [run for run in runs if run.get("warm", 0) == warm]
        begin = f"{warm} common BF16 steps" if warm else "common initial weights"
        for variant in dict.fromkeys(run["variant"] for run in mine):
            if variant != AGAINST:
                found = _difference(mine, variant)
                lines.append(f"| {begin} | {variant} | {len(found)} | {_shown(mean_interval(found))} |")
    tokens = sorted({run["steps"] * run["batch"] * TOKENS_OF_SEQUENCE for run in runs})
    shown = " or ".join(f"{number:,}" for number in tokens)
    return "\n".join([*lines, "", f"{len(runs)} runs of {shown} tokens after the common start."])


def _difference(runs: list[dict[str, Any]], variant: str) -> list[float]:
    """Percent, for each seed that has both."""
    base = {run["seed"]: run["loss"] for run in runs if run["variant"] == AGAINST}
    pairs = [
        (run["loss"], base[run["seed"]]) for run in runs if run["variant"] == variant and run["seed"] in base
    ]
    return [100 * (mine / theirs - 1) for mine, theirs in pairs]


def _shown(interval: Interval) -> str:
    if interval.low != interval.low:
        return f"{interval.mean:+.3f}% (one seed)"
    word = "resolved" if interval.resolved else "not resolved"
    return f"{interval.mean:+.3f}% ({interval.low:+.3f} to {interval.high:+.3f}), {word}"
