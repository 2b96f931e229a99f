"""`moe-runtime plan`: what a run would cost, fit and take, without a GPU."""

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.cli.plan.host import describe_host, host_fields
from moe_runtime.cli.plan.note import note
from moe_runtime.cli.plan.page import page as draw_page
from moe_runtime.cli.plan.searching import describe_search, search_fields, write_winner
from moe_runtime.cli.plan.text import describe
from moe_runtime.cli.plan.validate import calibrate_file, validate_run
from moe_runtime.config.load import find_config, load_config, sections_of
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.host.ranking import rank_on_cores
from moe_runtime.planner.host.step import host_step
from moe_runtime.planner.reckon.layouts import search_layouts
from moe_runtime.planner.reckon.plan import Plan
from moe_runtime.planner.reckon.plan import plan as reckon
from moe_runtime.planner.reckon.plan_fields import plan_fields
from moe_runtime.planner.reckon.scale import at_scales

Write = Annotated[
    Path | None, typer.Option(help="of --search: file for the best run [default: under out_dir/plans]")
]
Validate = Annotated[
    Path | None, typer.Option(metavar="RUN_DIR", help="hold a run that was made against its plan")
]
Calibrate = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="write a cluster file of this machine from short runs of CONFIG"),
]


def plan(
    config: Annotated[
        str | None,
        typer.Argument(help="run config as for train, or a model config such as configs/model/tiny.yaml"),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="section.key=value ...; a model config needs layout, batch and tokens here"),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="name under configs/cluster, or a file [default: h800; of --validate: local]"),
    ] = None,
    imbalance: Annotated[
        float, typer.Option(min=1.0, max=1000.0, help="rows of the fullest rank's experts, over the mean")
    ] = 1.0,
    search: Annotated[
        bool, typer.Option("--search", help="look at every layout, rank them, write the best one's config")
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="of --search: accelerators [default: pp x dp of the run]")
    ] = None,
    write: Write = None,
    page: Annotated[Path | None, typer.Option(help="HTML file to draw the plan into")] = None,
    brief: Annotated[bool, typer.Option("--note", help="a few lines, as a comment for the config")] = False,
    validate: Validate = None,
    calibrate: Calibrate = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of text")] = False,
) -> int:
    """Reckon time, memory, traffic and cost of a run on a cluster.

    Three worlds: every figure of the cluster file at the end of its range that makes the run slower, at its
    central value, or at the end that makes it faster. Exits with 2 if the run does not fit into memory.

    --validate reads the config, records and trace of a run that was made; the cluster is the one it was on.
    --calibrate makes four short runs here, a rank for each core, and writes what they took.
    """
    _check_together(
        {
            "--search": search,
            "--validate": validate,
            "--calibrate": calibrate,
            "--page": page,
            "--note": brief,
        }
    )
    _check_of_search(search, {"--gpus": gpus, "--write": write})
    if validate is not None:
        return validate_run(validate, cluster or "local", as_json)
    if calibrate is not None:
        return calibrate_file(config, calibrate)
    if config is None:
        raise ConfigError("plan: expected CONFIG, or --validate RUN_DIR, got neither")
    run, machine = open_run(config, overrides or []), load_cluster(cluster or "h800")
    if search:
        _search(run, machine, gpus, write, imbalance, as_json)
        return 0
    return _note(run, machine, imbalance) if brief else _plan(run, machine, imbalance, page, as_json)


def _plan(run: RunConfig, cluster: Cluster, imbalance: float, page: Path | None, as_json: bool) -> int:
    """Reckon and tell; 2 if it does not fit."""
    found = reckon(run, cluster, imbalance=imbalance)
    if page is not None:
        _save(page, draw_page(found, at_scales(run, cluster, imbalance=imbalance)))
    _tell(found, as_json)
    if found.misfit is None:
        return 0
    typer.echo(found.misfit, err=True)
    return 2


def _note(run: RunConfig, cluster: Cluster, imbalance: float) -> int:
    typer.echo("\n".join(note(reckon(run, cluster, imbalance=imbalance, with_sensitivity=False))))
    return 0


def _check_together(options: dict[str, object]) -> None:
    """Each of these asks for another answer."""
    given = [option for option, value in options.items() if value]
    if len(given) > 1:
        raise ConfigError(f"plan: expected one of {', '.join(options)}, got {' and '.join(given)}; leave one")


def _check_of_search(search: bool, options: dict[str, object]) -> None:
    for option, value in options.items():
        if value is not None and not search:
            raise ConfigError(f"plan {option}: expected --search beside it, got none; add it")


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--page {path}: cannot be written: {error.strerror}; give another file") from None


def _search(
    run: RunConfig, cluster: Cluster, gpus: int | None, write: Path | None, imbalance: float, as_json: bool
) -> None:
    """Rank all layouts; the winner's config is written, and refused ones are told also if nothing fits."""
    count = gpus or run.layout.pp * run.layout.dp
    found = search_layouts(run, cluster, count, imbalance=imbalance)
    if cluster.host is not None:
        found = rank_on_cores(found)
    if not found.ranked:
        typer.echo(json.dumps(search_fields(found)) if as_json else describe_search(found))
    path = write_winner(found, write)
    if as_json:
        typer.echo(json.dumps({**search_fields(found), "written": str(path)}))
    elif found.ranked:
        typer.echo(f"{describe_search(found)}\n\nthe fastest is in {path}: moe-runtime train {path}")


def _tell(found: Plan, as_json: bool) -> None:
    fields, text = plan_fields(found), describe(found)
    if found.cluster.host is not None and found.misfit is None:
        step = host_step(found.config, found.cluster)
        fields |= host_fields(found, step)
        text = f"{describe_host(found, step)}\n\n{text}"
    typer.echo(json.dumps(fields) if as_json else text)


def open_run(config: str, overrides: list[str]) -> RunConfig:
    """A run from its config, or from a model config with the rest as overrides.

    Raises:
        ConfigError: one line for each mistake, a missing layout, batch or number of tokens among them.
    """
    if "data" in sections_of(config) or any(one.startswith("data.") for one in overrides):
        return load_config(config, overrides)
    return load_config(config, [f"name={find_config(config).stem}", "data.path=none", *overrides])
