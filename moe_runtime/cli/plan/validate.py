"""`moe-runtime plan --validate RUN_DIR` and `--calibrate FILE`: a plan beside a run that was made."""

import json
import tempfile
from pathlib import Path

import typer

from moe_runtime.cli.plan.text import table
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.hardware.save import cluster_text
from moe_runtime.planner.host.observed import observe
from moe_runtime.planner.validate.compare import Comparison, Line, compare


def validate_run(folder: Path, cluster: str, as_json: bool) -> int:
    """Print a run beside its plan; 0."""
    found = compare(observe(folder), load_cluster(cluster))
    typer.echo(json.dumps(found.to_plain()) if as_json else describe_comparison(found))
    return 0


def calibrate_file(config: str | None, file: Path) -> int:
    """Calibrate on a config's shape, the shipped one by default, and write the cluster file; 0.

    Raises:
        ConfigError: a short run failed, or the file cannot be written.
    """
    from moe_runtime.cli.calibrate.make import CONFIG, calibrate_machine  # brings psutil

    typer.echo("probes and four short runs: a minute on a machine that does nothing else", err=True)
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        found = calibrate_machine(config or CONFIG, Path(folder), file.stem)
    try:
        file.write_text(cluster_text(found))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); choose another place") from error
    typer.echo(f"{file}: cluster {file.stem}, of this machine; plan with --cluster {file}")
    return 0


def describe_comparison(found: Comparison) -> str:
    """A table, and what cannot be compared."""
    rows = [[f"{found.run} on {found.cluster}", "predicted", "measured", "error"]]
    for line in found.lines:
        error = "" if line.error is None else f"{line.error:+.1%}"
        rows.append([line.name, _cell(line, line.predicted), _cell(line, line.measured), error])
    missing = [f"not compared: {reason}" for reason in found.missing]
    return "\n".join([table(rows), *missing])


def _cell(line: Line, value: float) -> str:
    match line.unit:
        case "B":
            return f"{value:,.0f} B"
        case "tokens/s":
            return f"{value:,.0f}/s"
        case "of step":
            return f"{value:.1%}"
    return f"{value:.4f} s"
