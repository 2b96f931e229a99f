"""`moe-runtime metrics`: makes a run of another program out of the records of a run folder."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moe_runtime.cli.replay_alerts import alerts
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.metrics.wandb_run import RunPlace, WandbRun

app = typer.Typer(no_args_is_help=True, help="Explain the records of runs, give them to W&B or TensorBoard.")

app.command("alerts")(alerts)

_TOLD_EVERY = 10_000  # steps between words on how far it is


@app.command()
def describe(
    keys: Annotated[
        list[str] | None, typer.Argument(help="such as routing/violation/max, or beginnings; all if left out")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="all of docs/metrics.md")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object, by key")] = False,
) -> None:
    """Say what the numbers of a record mean, in which unit, and where they are measured."""
    from moe_runtime.metrics.page import described, page, text_of

    if markdown and (keys or as_json):
        raise ConfigError("--markdown: writes the whole page; leave out --json and the keys")
    if markdown:
        typer.echo(page(), nl=False)
        return
    found = described(keys or ())
    if as_json:
        typer.echo(json.dumps({path: metric._asdict() for path, metric in found.items()}, indent=2))
    else:
        typer.echo(text_of(found))


@app.command()
def sync(
    run_dir: Annotated[Path, typer.Argument(help="run folder, such as runs/quickstart")],
    to: Annotated[Literal["wandb", "tensorboard"], typer.Option(help="what to make")] = "wandb",
    online: Annotated[bool, typer.Option("--online", help="send it to W&B's server; needs a key")] = False,
    project: Annotated[
        str | None, typer.Option(help="of W&B [default: metrics.wandb_project of the run]")
    ] = None,
) -> None:
    """Rebuild a W&B or TensorBoard run from metrics.jsonl, complete, whatever the old one lacks."""
    # Imported here: torch takes seconds, and --help should not.
    from moe_runtime.metrics.rebuild import read_config, records_of

    if to == "tensorboard" and (online or project is not None):
        option = "--online" if online else "--project"
        raise ConfigError(f"{option}: is for W&B, got --to tensorboard; leave it out")
    config = read_config(run_dir)
    next(records_of(run_dir))  # before anything is made
    try:
        if to == "tensorboard":
            said = _to_tensorboard(run_dir, config)
        else:
            said = _to_wandb(run_dir, config, project, online)
    except OSError as error:
        where = error.filename or run_dir
        raise ConfigError(f"{where}: cannot be written ({error.strerror}); make room there") from error
    typer.echo(said)


def _to_tensorboard(run_dir: Path, config: dict[str, Any]) -> str:
    """Written aside and put in its place when whole, so that an older copy stands until then."""
    from moe_runtime.metrics.rebuild import rebuild
    from moe_runtime.metrics.tensorboard_copy import TensorBoardCopy

    folder, aside = run_dir / "tensorboard", run_dir / "tensorboard.new"
    shutil.rmtree(aside, ignore_errors=True)
    copy = TensorBoardCopy(aside, config)
    steps = rebuild(run_dir, copy, _told, _warn)
    copy.finish()
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return f"{steps} steps in {folder}; look at them with: tensorboard --logdir {folder}"


def _to_wandb(run_dir: Path, config: dict[str, Any], project: str | None, online: bool) -> str:
    """A new run, under which a resumed training goes on; one that is under way keeps its own."""
    from moe_runtime.metrics.rebuild import rebuild
    from moe_runtime.metrics.wandb_run import RunPlace, end_session, keep_id, new_id
    from moe_runtime.train.run_lock import is_in_use

    named = project or config.get("metrics", {}).get("wandb_project", "moe_runtime")
    place = RunPlace(run_dir, config, str(config.get("name", run_dir.name)), named, new_id())
    run = _open(place, online)
    if not is_in_use(run_dir):
        keep_id(run_dir, place.run_id)
    steps = rebuild(run_dir, run, _told, _warn)
    folder = run.folder
    said = f"at {run.url}" if online else f"in {folder}; send them with: wandb sync {folder}"
    run.finish()
    end_session()
    return f"{steps} steps {said}"


def _open(place: "RunPlace", online: bool) -> "WandbRun":
    from moe_runtime.metrics.wandb_run import open_run

    try:
        return open_run(place, "online" if online else "offline")
    except ImportError as error:
        raise ConfigError(f"wandb: expected the package, got none ({error}); pip install wandb") from None
    except Exception as error:
        if not online:
            raise
        reason = " ".join(str(error).split())[:200]
        remedy = "without --online it is made here, and `wandb sync` sends it"
        raise ConfigError(f"--online: {reason}; {remedy}") from error


def _told(step: int) -> None:
    if step % _TOLD_EVERY == 0:
        typer.echo(f"step {step}", err=True)


def _warn(text: str) -> None:
    typer.echo(f"warning: {text}", err=True)
