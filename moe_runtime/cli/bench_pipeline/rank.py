"""One rank process: `python -m moe_runtime.cli.bench_pipeline.rank SOCKET RANK FOLDER`.

It lives for the whole measurement, holds every contender, and runs a step of the one it is asked for.
"""

import dataclasses
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.cli.bench_pipeline.contenders import Bench, Runner, gradient_squares, open_runner
from moe_runtime.cli.bench_pipeline.settings import CONTENDERS, Settings
from moe_runtime.cli.orphan import stop_with_parent
from moe_runtime.cli.testbed.line import Line
from moe_runtime.cli.testbed.links import count_link
from moe_runtime.cli.testbed.quota import join_share
from moe_runtime.errors import MoeRuntimeError

_PATIENCE = timedelta(minutes=10)


def main() -> None:
    """Join the group, set up contenders, run steps until told to leave."""
    stop_with_parent()
    number, rank, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    line = Line(number)
    first = line.hear()
    settings = Settings.from_plain(first["settings"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=settings.world_size,
        timeout=_PATIENCE,
    )
    bench = Bench(settings, rank)
    runners, refused = _open_runners(bench)
    if first["shares"]:
        join_share(Path(first["shares"][rank]))  # only now: imports would take minutes of a small share
    said = {name: runner.said for name, runner in runners.items() if runner.said is not None}
    line.say({"refused": refused, "said": said})
    while "run" in (word := line.hear()):
        line.say(_run(runners[word["run"]], bench, line, word["compare"]))
    line.say({})
    # At once: gloo threads that outlive the interpreter abort a good run now and then.
    os._exit(0)


def _open_runners(bench: Bench) -> tuple[dict[str, Runner], dict[str, str]]:
    """Contenders by name, and why others cannot run; all ranks find the same."""
    runners: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    for name in bench.settings.contenders:
        try:
            runners[name] = open_runner(CONTENDERS[name], bench)
        except MoeRuntimeError as error:
            refused[name] = str(error)
    return runners, refused


def _run(runner: Runner, bench: Bench, line: Line, compare: bool) -> dict[str, Any]:
    """One step, from the moment when all ranks have come to it."""
    bench.clear_gradients()
    before = count_link() if bench.settings.has_links else None
    cpu = time.process_time()
    line.barrier()
    begin = time.perf_counter()
    told = runner.step()
    end, cpu_s = time.perf_counter(), time.process_time() - cpu
    result: dict[str, Any] = {"begin": begin, "end": end, "cpu_s": cpu_s, **dataclasses.asdict(told)}
    if before is not None:
        result["link_bytes"] = (count_link() - before).sent_bytes
    if compare:
        result["squares"] = gradient_squares(runner)
    return result


if __name__ == "__main__":
    main()
