"""`moe-runtime config`: see what a config resolves to, how two differ, and what keys there are."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from moe_runtime.config.derive import count_parameters, tokens_before, tokens_per_step, total_steps
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.load import dump_config, load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.fp8.policy import Policy

app = typer.Typer(no_args_is_help=True, help="Show, compare and describe configs.")

Config = Annotated[str, typer.Argument(help="file, run folder, or name under configs/run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]


@app.command()
def show(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Print the resolved config and what follows from it: weights, batches, steps, layout."""
    run = load_config(config, tuple(overrides or ()))
    derived = derived_facts(run)
    if as_json:
        typer.echo(json.dumps({"config": run.model_dump(mode="json"), "derived": derived}))
        return
    typer.echo(dump_config(run))
    width = max(map(len, derived))
    for name, value in derived.items():
        typer.echo(f"# {name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


@app.command()
def diff(first: Config, second: Config) -> None:
    """Print the keys whose values differ, one a line; nothing if the two are alike."""
    old, new = (dict(leaves(load_config(name).model_dump(mode="json"))) for name in (first, second))
    for key in dict.fromkeys([*old, *new]):
        if key not in old or key not in new or old[key] != new[key]:
            typer.echo(f"{key}: {_text(old, key)} -> {_text(new, key)}")


@app.command()
def schema() -> None:
    """Print the JSON schema of a run, for editors that complete and check YAML."""
    typer.echo(json.dumps(RunConfig.model_json_schema(), indent=2))


def derived_facts(run: RunConfig) -> dict[str, Any]:
    """What follows from a run, by name: whole numbers, or short text."""
    layout = check_layout(run)
    counts = count_parameters(run.model)
    steps = total_steps(run, layout)
    return {
        "parameters_total": counts.total,
        "parameters_active": counts.active,
        "parameters_mtp": counts.mtp,
        **{f"parameters_{name}": count for name, count in counts.parts.items()},
        **({"fp8": Policy(run.fp8).summary()} if run.precision == "fp8" else {}),
        "world_size": layout.world_size,
        "schedule": layout.schedule,
        "dispatcher": layout.dispatcher,
        "layers_per_stage": " ".join(str(len(layers)) for layers in layout.layers),
        "microbatches": _microbatches(layout),
        "tokens_per_step": tokens_per_step(run),
        "total_steps": steps,
        "total_tokens": tokens_before(run, layout, steps),
    }


def _microbatches(layout: ResolvedLayout) -> str:
    if layout.num_microbatches_start == layout.num_microbatches:
        return f"{layout.num_microbatches} a lane"
    start = f"{layout.num_microbatches_start} at first ({layout.start_batch_size:,} sequences a step)"
    return f"{start}, {layout.num_microbatches} after the ramp"


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict with their dotted paths."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def _text(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(not there)"
