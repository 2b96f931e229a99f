"""Probes on as many processes as there are cores, and the medians over them."""

import os
import statistics
from typing import Any

from moe_runtime.cli.testbed.crew import open_crew, working_folder
from moe_runtime.planner.host.probes import Probes

_SILENCE_S = 120.0


def probe(processes: int | None = None) -> Probes:
    """Measure this machine.

    Args:
        processes: at the same time, 2 or more; None: one for each core.

    Raises:
        RankFailed: a process of the measurement died.
    """
    count = max(2, processes or len(os.sched_getaffinity(0)))
    with (
        working_folder() as folder,
        open_crew("moe_runtime.cli.probe.rank", count, folder, _SILENCE_S) as crew,
    ):
        said = crew.ask({"processes": count})
    first = said[0]
    return Probes(
        products={kind: _medians(said, "products", kind) for kind in first["products"]},
        attention={way: _medians(said, "attention", way) for way in first["attention"]},
        copy_bytes_s=statistics.median(each["copy"] for each in said),
        message_s={int(size): seconds for size, seconds in first["messages"].items()},
        cores=len(os.sched_getaffinity(0)),
    )


def _medians(said: list[dict[str, Any]], part: str, kind: str) -> dict[int, float]:
    sizes = said[0][part][kind]
    return {int(size): statistics.median(each[part][kind][size] for each in said) for size in sizes}
