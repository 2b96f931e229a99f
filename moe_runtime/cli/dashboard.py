"""`moe-runtime dashboard`: the workspace of W&B that shows what goes wrong in a mixture of experts."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.errors import ConfigError

_NO_KEY = "dashboard: no API key of W&B: set WANDB_API_KEY or run `wandb login`; --json FILE needs no server"


def dashboard(
    run_dir: Annotated[
        Path | None, typer.Argument(help="a run whose numbers decide what is shown [default: all panels]")
    ] = None,
    project: Annotated[
        str | None, typer.Option(help="of W&B [default: that of the run, or moe_runtime]")
    ] = None,
    entity: Annotated[str | None, typer.Option(help="user or team of W&B [default: the key's own]")] = None,
    update: Annotated[
        str | None, typer.Option(help="URL of a saved workspace, whose sections are replaced", metavar="URL")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="write it there and save nothing; -: standard output")
    ] = None,
) -> None:
    """Save a W&B workspace with the panels of learning, routing, performance, numerics and reliability."""
    if update is not None and json_file is not None:
        raise ConfigError("--update: saves to W&B and --json does not, got both; leave one out")
    # Imported here: W&B takes a second, and --help should not.
    from moe_runtime.metrics import workspace
    from moe_runtime.metrics.rebuild import read_config
    from moe_runtime.metrics.wandb_run import has_key

    if project is None:
        config = {} if run_dir is None else read_config(run_dir)
        project = str(config.get("metrics", {}).get("wandb_project", "moe_runtime"))
    emitted = None if run_dir is None else _emitted(run_dir)
    if json_file is not None:
        _write(workspace.to_json(workspace.build_workspace(entity or "", project, emitted)), json_file)
        return
    if not has_key():
        raise ConfigError(_NO_KEY)
    built = workspace.build_workspace(entity or workspace.default_entity(), project, emitted)
    typer.echo(workspace.save(built, update))


def _emitted(run_dir: Path) -> set[str]:
    """Flat keys of all records of a run, and those of its pictures and tables."""
    from moe_runtime.metrics.panel import ALERTS, HEATMAP, SAMPLES, TIMELINE, flat_values
    from moe_runtime.metrics.rebuild import records_of

    keys = {key for record in records_of(run_dir) for key in flat_values(record)}
    return keys | {ALERTS, HEATMAP, SAMPLES, TIMELINE}


def _write(text: str, file: Path) -> None:
    if str(file) == "-":
        sys.stdout.write(text + "\n")
        return
    try:
        file.write_text(text + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {file} cannot be written ({error.strerror}); choose another") from error
