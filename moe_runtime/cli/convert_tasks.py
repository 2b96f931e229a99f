"""`moe-runtime convert tasks`: items of ours as tasks of lm-evaluation-harness."""

import re
from pathlib import Path
from typing import Annotated

import typer


def tasks(
    file: Annotated[Path, typer.Argument(help="JSONL of items, as `eval --tasks` reads it")],
    folder: Annotated[Path, typer.Argument(help="folder for YAML and JSONL, given to --include_path there")],
    name: Annotated[str | None, typer.Option(help="of the task; otherwise the file's")] = None,
    shots: Annotated[int, typer.Option(min=0, help="as of `eval`: the first items are examples")] = 0,
) -> None:
    """Write items as tasks of lm-evaluation-harness, which then scores an exported model as `eval` does."""
    from moe_runtime.evaluation.harness_tasks import write_tasks
    from moe_runtime.evaluation.task_items import read_items, with_examples

    items = with_examples(read_items(file), shots, file)
    word = name or re.sub(r"[^A-Za-z0-9_.-]+", "_", file.stem)
    written = write_tasks(items, word, folder)
    parts = f" (a group of {len(written)} tasks)" if len(written) > 1 else ""
    typer.echo(
        f"{folder}: {len(items)} items as {word}{parts}; run them with "
        f"lm-eval run --model hf --model_args pretrained=HF_DIR --include_path {folder} --tasks {word}"
    )
