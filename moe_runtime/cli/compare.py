"""`moe-runtime compare`: several models on the same text and tasks, as a table, as JSON and as a picture."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.evaluate import Shots, Tasks, check_room, require_once
from moe_runtime.cli.generate import check_device
from moe_runtime.errors import ConfigError

MARKDOWN, JSON, PLOT = "comparison.md", "comparison.json", "comparison.png"

Paths = Annotated[
    list[Path], typer.Argument(help="runs or checkpoints of ours, or model folders of transformers")
]
Data = Annotated[
    list[Path] | None,
    typer.Option(help="folder of prepared data, whose validation documents are read; repeatable"),
]
Context = Annotated[int | None, typer.Option(help="tokens of a window; otherwise what all models see")]


def compare(
    paths: Paths,
    out: Annotated[Path, typer.Option(help=f"folder for {MARKDOWN}, {JSON} and {PLOT}")],
    data: Data = None,
    tasks: Tasks = None,
    documents: Annotated[int, typer.Option(min=0, help="of a set at most so many; 0: all")] = 64,
    max_bytes: Annotated[int, typer.Option(min=16, help="of a document at most so many")] = 4096,
    context: Context = None,
    shots: Shots = 0,
    plot: Annotated[bool, typer.Option(help="draw the picture too")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ema: Annotated[bool, typer.Option("--ema", help="of ours, the average of the weights")] = False,
) -> None:
    """Compare models, differences from the first with 95% intervals, paired by document and item."""
    if not data and not tasks:
        raise ConfigError(
            "compare: expected --data FOLDER or --tasks FILE.jsonl, got neither; give one of them"
        )
    require_once("compare", paths)
    require_once("--data", data or ())
    require_once("--tasks", tasks or ())
    # Imported here: torch takes seconds, and `--help` should not.
    from moe_runtime.cli.evaluating.comparing import Wanted, compare_models
    from moe_runtime.evaluation.comparison_plot import check_plots, draw
    from moe_runtime.evaluation.comparison_text import as_markdown

    check_device(device)
    check_room("--out", out)
    if plot:
        check_plots()
    wanted = Wanted(
        paths=paths,
        data=data or (),
        tasks=tasks or (),
        documents=documents or None,
        max_bytes=max_bytes,
        context=context,
        shots=shots,
        device=device,
        ema=ema,
    )
    table = compare_models(wanted)
    text = as_markdown(table)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARKDOWN).write_text(text)
        (out / JSON).write_text(json.dumps(table.as_json(), indent=1) + "\n")
        if plot:
            draw(table, out / PLOT)
    except OSError as error:
        raise ConfigError(f"--out {out}: expected a folder to write, got: {error.strerror}") from error
    typer.echo(text, nl=False)
