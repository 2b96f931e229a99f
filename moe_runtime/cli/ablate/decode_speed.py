"""Decode speed of two checkpoints: the table of what `bench generate --against --json` measured."""

import json
from pathlib import Path
from typing import Any


def decode_table(file: Path) -> str:
    """Markdown: medians of tokens a second at each shape, and the ratio within rounds.

    Args:
        file: of one call; its first checkpoint is held against the other.
    """
    record = json.loads(file.read_text())
    found, subject = record["against"], record["subject"]
    this, other = (found["checkpoints"][name]["attention"] for name in ("this", "against"))
    lines = [f"| context | batch | {this}, tokens/s | {other}, tokens/s | {this} / {other} |"]
    lines.append(f"|{' --- |' * 5}")
    for shape in found["shapes"]:
        mine, theirs = shape["results"]["this"], shape["results"]["against"]
        cells = [f"{shape['context']:,}", str(shape["batch"]), _speed(mine), _speed(theirs), _ratio(mine)]
        lines.append(f"| {' | '.join(cells)} |")
    text = (
        f"Medians of {subject['rounds']} rounds in turn, {found['tokens']} tokens each, {subject['threads']} "
        f"thread, FP32, torch {subject['torch']}; ranges are from the slowest round to the fastest."
    )
    return "\n".join([*lines, "", text])


def _speed(result: dict[str, Any]) -> str:
    return f"{result['tokens_per_s']:,.0f}"


def _ratio(result: dict[str, Any]) -> str:
    low, high = result["ratio_range"]
    return f"{result['ratio']:.2f}x ({low:.2f} to {high:.2f})"
