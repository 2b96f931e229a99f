"""`moe-runtime metrics describe`: what a number of the record is."""

from typing import Annotated

import typer

from moe_runtime.config.closest import closest
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.page import page
from moe_runtime.metrics.record import METRICS, metric_of


def describe(
    names: Annotated[
        list[str] | None, typer.Argument(help="numbers, such as loss or routing/violation; none: all of them")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="the page docs/metrics.md")] = False,
) -> None:
    """Say what the numbers of metrics.jsonl are: definition, unit, and where they are measured."""
    if markdown:
        typer.echo(page(), nl=False)
        return
    for path in [path for name in names for path in _paths(name)] if names else METRICS:
        metric = metric_of(path)
        assert metric is not None, "of the list"
        typer.echo(f"{path} [{metric.unit}]: {metric.definition} ({metric.source})")


def _paths(name: str) -> list[str]:
    """The numbers that a name or the beginning of one means.

    Raises:
        ConfigError: there is none.
    """
    if metric_of(name) is not None:
        return [name]
    found = [path for path in METRICS if path.startswith(f"{name}/")]
    if not found:
        near = closest(name, list(METRICS))
        hint = f"; did you mean {' or '.join(near)}?" if near else ", as docs/metrics.md lists them"
        raise ConfigError(f"metrics describe: expected a number of a record, got {name!r}{hint}")
    return found
