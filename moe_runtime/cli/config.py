"""`moe-runtime config`: see what a config resolves to, how two differ, and what keys there are."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_runtime.config.derive import count_parameters, tokens_before, tokens_per_step, total_steps
from moe_runtime.config.json_schema import file_schema, run_schema
from moe_runtime.config.keys import Key, find_keys
from moe_runtime.config.layout import ResolvedLayout, check_layout
from moe_runtime.config.load import dump_config, load_config
from moe_runtime.config.origins import leaves, origins
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.fp8.policy import Policy
from moe_runtime.metrics.alert_rules import rules_of

app = typer.Typer(no_args_is_help=True, help="Show, compare and describe configs.")

Config = Annotated[str, typer.Argument(help="file, run folder, or name under configs/run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object instead of text")]


@app.command()
def show(
    config: Config,
    overrides: Overrides = None,
    where: Annotated[
        bool, typer.Option("--where", help="one key a line, with the file and line that its value is from")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the resolved config and what follows from it: weights, batches, steps, layout."""
    given = tuple(overrides or ())
    run = load_config(config, given)
    rules_of(run)  # refuses alerts on what no record has
    derived = derived_facts(run)
    if as_json:
        fields = {"config": run.model_dump(mode="json"), "derived": derived}
        places = {key: place for key, (_, place) in origins(config, given).items()} if where else None
        typer.echo(json.dumps(fields if places is None else fields | {"where": places}))
        return
    if where:
        rows = [(key, json.dumps(value), place) for key, (value, place) in origins(config, given).items()]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        typer.echo("\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows))
        return
    typer.echo(dump_config(run))
    width = max(map(len, derived))
    for name, value in derived.items():
        typer.echo(f"# {name:<{width}}  {f'{value:,}' if isinstance(value, int) else value}")


@app.command()
def diff(
    configs: Annotated[
        list[str],
        typer.Argument(
            help="FIRST [a.b=c ...] [SECOND [a.b=c ...]]; without SECOND: FIRST alone, and with its a.b=c"
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Print the keys whose values differ, one a line; nothing if the two are alike."""
    first, second = _sides(configs)
    old, new = (dict(leaves(load_config(*side).model_dump(mode="json"))) for side in (first, second))
    changed = [
        key for key in dict.fromkeys([*old, *new]) if key not in old or key not in new or old[key] != new[key]
    ]
    if as_json:
        typer.echo(json.dumps({key: [old.get(key), new.get(key)] for key in changed}))
        return
    for key in changed:
        typer.echo(f"{key}: {_text(old, key)} -> {_text(new, key)}")


@app.command()
def schema(
    resolved: Annotated[
        bool, typer.Option("--resolved", help="of a whole run, as config.yaml of a run folder has it")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="write it to this file")] = None,
) -> None:
    """Print the JSON schema of a config file, for editors that complete and check YAML."""
    text = json.dumps(run_schema() if resolved else file_schema(), indent=1, ensure_ascii=False)
    if out is None:
        typer.echo(text)
        return
    try:
        out.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}; name another file") from None
    typer.echo(f"{out}: first line of a config: # yaml-language-server: $schema=PATH_TO/{out.name}", err=True)


@app.command()
def keys(
    prefix: Annotated[str, typer.Argument(help="a section, the start of a key, or a word about it")] = "",
    as_json: AsJson = False,
) -> None:
    """List keys: what each takes, its default, what it is."""
    found = find_keys(prefix)
    if as_json:
        typer.echo(json.dumps([key.fields() for key in found]))
        return
    width = max(len(key.name) for key in found)
    typer.echo("\n".join(f"{key.name:<{width}}  {_said(key)}" for key in found))


def _said(key: Key) -> str:
    default = "required" if key.required else f"default {json.dumps(key.default, default=str)}"
    return f"{key.takes}; {default}" + (f". {key.description}" if key.description else "")


def _sides(words: list[str]) -> tuple[tuple[str, list[str]], tuple[str, list[str]]]:
    """The two configs to compare, each with the overrides that follow it.

    Raises:
        ConfigError: there are not two.
    """
    sides: list[tuple[str, list[str]]] = []
    for word in words:
        is_override = re.match(r"[A-Za-z_][\w.]*=", word) is not None and not Path(word).exists()
        if not is_override:
            sides.append((word, []))
        elif sides:
            sides[-1][1].append(word)
        else:
            raise ConfigError(f"config diff: expected a config before its overrides, got {word}")
    if len(sides) == 1 and sides[0][1]:
        sides.insert(0, (sides[0][0], []))
    if len(sides) != 2:
        names = ", ".join(name for name, _ in sides)
        raise ConfigError(f"config diff: expected two configs, or one with overrides, got {names}")
    return sides[0], sides[1]


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


def _text(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key]) if key in values else "(not there)"
