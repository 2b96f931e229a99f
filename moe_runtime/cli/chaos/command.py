"""`moe-runtime chaos`: does a run survive what large runs meet, and is its result the same?"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_runtime.cli.chaos.draw import Draw, kinds_of
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError

if TYPE_CHECKING:
    from moe_runtime.cli.chaos.report import Report

_FOR_EVER = 100_000_000  # steps: the seconds end the run
# A fault is told apart from slow work by these; a user's own overrides win.
_QUICK = ("train.watchdog_s=5", "reliability.heartbeat_s=0.5", "reliability.limits.data=5")
_QUICKER = ("reliability.limits.optimizer=5", "reliability.restarts=100", "reliability.back_off_s=0.1")


def chaos(
    config: Annotated[str, typer.Argument(help="run config, such as configs/run/quickstart.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="a.b=c ...")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="of training under faults")] = 120.0,
    every: Annotated[
        float, typer.Option(min=0.1, help="seconds from one recovery to the next fault, mean")
    ] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="of the faults")] = 0,
    kinds: Annotated[str, typer.Option(help="exact, all, or kinds with commas")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> None:
    """Train under random faults, then without, and compare the final states bit by bit; 1 if they differ."""
    given = list(overrides or ())
    chosen = kinds_of(kinds)
    run = load_config(config, given)
    ranks = check_layout(run).world_size
    # Imported here: torch takes seconds, and a wrong config should be told at once.
    from moe_runtime.cli.chaos.drive import Drive
    from moe_runtime.cli.chaos.report import Report, text_of

    has_exchanges = run.model.num_layers > run.model.num_dense_layers
    report, under = Report(seed), f"{run.name}-chaos"
    faulty = ["train", config, *_QUICK, *_QUICKER, *given, f"name={under}", f"train.total_steps={_FOR_EVER}"]
    drive = Drive(faulty, Path(run.out_dir) / under, Draw(seed, ranks, chosen, has_exchanges), report)
    typer.echo(f"training {under} for {seconds:g} s with faults on {ranks} ranks", err=True)
    drive.run(seconds, every)
    if not report.failure:
        _compare(config, given, run, report)
    _write(Path(run.out_dir) / under / "chaos.json", report.to_json())
    typer.echo(json.dumps(report.to_json()) if as_json else text_of(report))
    if not report.is_good:
        raise typer.Exit(1)


def _compare(config: str, given: list[str], run: RunConfig, report: "Report") -> None:
    """The same steps without faults, given the same decisions, and what differs in the end."""
    from moe_runtime.cli.chaos.decisions import decisions_of
    from moe_runtime.cli.chaos.same import differences
    from moe_runtime.cli.chaos.watch import productive_s

    faulty, clean = (Path(run.out_dir) / f"{run.name}-{end}" for end in ("chaos", "clean"))
    report.productive_s = productive_s(faulty)
    typer.echo(f"training {clean.name} for the same {report.steps} steps without faults", err=True)
    command = [sys.executable, "-m", "moe_runtime.cli.launch", "train", config, *given, f"name={clean.name}"]
    command += [f"train.total_steps={report.steps}", *decisions_of(faulty), "--fresh"]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    report.clean_s = time.monotonic() - begun
    if done.returncode:
        raise ConfigError(f"the clean run ended with {done.returncode}: {done.stderr.strip()}")
    report.differences = differences(faulty, clean)


def _write(path: Path, found: dict) -> None:
    if path.parent.is_dir():
        path.write_text(json.dumps(found, indent=1))
