"""`moe-runtime eval`: how good a checkpoint is on prepared text, and on tasks of the user's."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.cli.generate import check_device
from moe_runtime.errors import ConfigError

Data = Annotated[
    list[Path] | None,
    typer.Option(help="folder of prepared data, whose validation split is read; repeatable"),
]
Tasks = Annotated[list[Path] | None, typer.Option(help="JSONL of items with choices or a target; repeatable")]
Shots = Annotated[
    int, typer.Option(min=0, help="the first items of each file are examples before the others")
]
Items = Annotated[Path | None, typer.Option(help="JSONL to write, an object for each item scored")]


def require_once(option: str, paths: Sequence[Path]) -> None:
    """Refuse a path given twice: it would count for two, and narrow the interval.

    Raises:
        ConfigError: names it.
    """
    seen = [path.resolve() for path in paths]
    for path in paths:
        if seen.count(path.resolve()) > 1:
            raise ConfigError(f"{option} {path}: expected each path once, got it twice; leave one out")


def evaluate(
    path: Annotated[Path, typer.Argument(help="run folder (its last good checkpoint) or checkpoint folder")],
    data: Data = None,
    tasks: Tasks = None,
    sequences: Annotated[int, typer.Option(min=0, help="of a set at most so many; 0: all")] = 64,
    shots: Shots = 0,
    items: Items = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ema: Annotated[bool, typer.Option("--ema", help="the average of the weights over steps")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Measure a checkpoint: loss, perplexity and bits per byte by source; tasks by likelihood or match."""
    if not data and not tasks:
        raise ConfigError("eval: expected --data FOLDER or --tasks FILE.jsonl, got neither; give one of them")
    if items is not None and not tasks:
        raise ConfigError("--items: expected --tasks FILE.jsonl beside it, got none")
    if items is not None and items.resolve() in {file.resolve() for file in tasks or ()}:
        raise ConfigError(f"--items {items}: expected another file than --tasks, which it would replace")
    require_once("--data", data or ())
    require_once("--tasks", tasks or ())
    # Imported here: torch takes seconds, and `--help` should not.
    from moe_runtime.cli.evaluating.models import language_model, open_ours
    from moe_runtime.cli.evaluating.sets import measure_set, set_lines, sets_report
    from moe_runtime.cli.evaluating.tasks import score_file, task_lines, task_report, write_items

    check_device(device)
    if items is not None:
        check_room("--items", items.parent)
    opened = open_ours(path, device, ema)
    checkpoint = opened.checkpoint
    report: dict[str, Any] = {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.manifest.step,
        "ema": ema,
    }
    lines: list[str] = []
    if data:
        figures = [measure_set(opened, folder, sequences or None) for folder in data]
        report |= sets_report(figures)
        lines += set_lines(figures, checkpoint.manifest.step)
    if tasks:
        model = language_model(opened, str(path))
        scored = [score_file(model, file, shots) for file in tasks]
        report |= {"shots": shots, "tasks": [task_report(one, model.context) for one in scored]}
        lines += [line for one in scored for line in task_lines(one, model.context)]
        if items is not None:
            write_items(scored, items)
    for line in [json.dumps(report)] if as_json else lines:
        typer.echo(line)


def check_room(option: str, folder: Path) -> None:
    """Say before an hour of measuring that what it gives could not be written.

    Raises:
        ConfigError: the folder neither is one nor can be made.
    """
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(f"{option}: expected a folder to write in, got {there}; choose another")
