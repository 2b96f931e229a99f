"""One measurement from settings to figures; runs in the process of the command."""

import os
from typing import Any

from moe_runtime.cli.bench_comm.crew import run_crew
from moe_runtime.cli.bench_comm.races import summarise_layer, summarise_overlap
from moe_runtime.cli.bench_comm.report import describe_exchange, describe_layer, describe_overlap
from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.testbed.crew import cpu_load, working_folder
from moe_runtime.cli.testbed.links import require_tools

_SILENCE_S = 600.0


def measure(settings: Settings) -> dict[str, Any]:
    """Run one part.

    Returns:
        {"settings", "part": figures}; for the exchange "routings" and "links".

    Raises:
        ConfigError: links cannot be made, or the shape does not suit a routing.
        RankFailed: a rank died.
    """
    if settings.rate_mbit is not None:
        require_tools()
    from moe_runtime.cli.bench_comm.summary import summarise_exchange, write_routings  # these bring torch

    result: dict[str, Any] = {"settings": settings.to_plain(), "machine_load": cpu_load()}
    with working_folder() as folder:
        routings = {} if settings.part == "layer" else write_routings(settings, folder)
        said = run_crew(settings, folder, _SILENCE_S)
    if settings.part == "layer":
        return result | {"layer": summarise_layer(said, settings)}
    if settings.part == "overlap":
        return result | {"overlap": summarise_overlap(said, settings)}
    entries = summarise_exchange(said, routings, settings)
    return result | {"links": said[0]["links"], "routings": entries}


def describe(result: dict[str, Any]) -> str:
    """The result as a table."""
    if "layer" in result:
        table = describe_layer(result["layer"])
    elif "overlap" in result:
        table = describe_overlap(result["overlap"])
    else:
        table = describe_exchange(result)
    cores, load = os.cpu_count(), result["machine_load"]
    return (
        f"{table}\nThis machine has {cores} processors; other work kept them {load:.0%} busy before the run."
    )
