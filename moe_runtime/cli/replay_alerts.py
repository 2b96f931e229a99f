"""`moe-runtime metrics alerts`: which alerts a run's records raise, by its own thresholds or by others."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.alert_rules import rules_of
from moe_runtime.metrics.alerts import Alerts
from moe_runtime.metrics.files import METRICS_FILE
from moe_runtime.metrics.jsonl import read_jsonl


def alerts(
    run_dir: Annotated[Path, typer.Argument(help="run folder, such as runs/quickstart")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="alerts.spike.threshold=8 ...; the others are the run's own")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """Judge the records of a run again: what its alerts, or others, would have told. Nothing is changed."""
    path = run_dir / METRICS_FILE
    if not path.is_file():
        raise ConfigError(f"{run_dir}: expected a run folder with {METRICS_FILE}, got none")
    judge = Alerts(rules_of(load_config(str(run_dir), tuple(overrides or ()))))
    steps = told = 0
    for line in read_jsonl(path):
        record = _as_measured(line)
        raised, over = judge.update(record)
        steps, told = steps + 1, told + len(raised)
        for alert in raised:
            event = {"step": alert.step, "message": alert.message} | alert.fields()
            typer.echo(json.dumps(event) if as_json else f"step {alert.step}: {alert.message}")
        for rule in over if not as_json else ():
            typer.echo(f"step {record['step']}: alert {rule.name} is over")
    if not as_json:
        typer.echo(f"{told} alert{'s' * (told != 1)} in {steps:,} steps, by {len(judge.rules)} rules")


def _as_measured(value: Any) -> Any:
    """A line of metrics.jsonl as the record that it was: what was not finite is null there."""
    if isinstance(value, dict):
        return {key: _as_measured(inner) for key, inner in value.items()}
    return math.nan if value is None else value
