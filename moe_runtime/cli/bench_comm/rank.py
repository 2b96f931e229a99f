"""One rank process: `python -m moe_runtime.cli.bench_comm.rank SOCKET RANK FOLDER`; started by `crew`."""

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.orphan import stop_with_parent
from moe_runtime.cli.testbed.line import Line

_PATIENCE = timedelta(minutes=10)


def part_of(name: str) -> Callable[[Settings, Path, Line], dict[str, Any]]:
    """The function that runs a part on this rank."""
    if name == "exchange":
        from moe_runtime.cli.bench_comm.exchange import run_exchange

        return run_exchange
    if name == "layer":
        from moe_runtime.cli.bench_comm.layer import run_layer

        return run_layer
    from moe_runtime.cli.bench_comm.overlap import run_overlap

    return run_overlap


def main() -> None:
    """Join the group, run the part, say the result, leave."""
    stop_with_parent()
    number, rank, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    line = Line(number)
    settings = Settings.from_plain(line.hear())
    run = part_of(settings.part)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=settings.world_size,
        timeout=_PATIENCE,
    )
    result = run(settings, folder, line)
    line.barrier()
    line.say(result)
    # At once: gloo threads that outlive the interpreter abort a good run now and then.
    os._exit(0)


if __name__ == "__main__":
    main()
