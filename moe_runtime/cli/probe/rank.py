"""One process of a probe: `python -m moe_runtime.cli.probe.rank SOCKET RANK FOLDER`; started by a crew."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from moe_runtime.cli.orphan import stop_with_parent
from moe_runtime.cli.probe.kernels import measure_kernels
from moe_runtime.cli.probe.messages import message_seconds
from moe_runtime.cli.testbed.line import Line


def main() -> None:
    """Measure beside the others, say the result, leave."""
    stop_with_parent()
    number, rank, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    line = Line(number)
    size = line.hear()["processes"]
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size)
    line.barrier()
    found = measure_kernels()
    line.barrier()
    if rank < 2 <= size:
        found["messages"] = message_seconds(rank)
    line.barrier()
    line.say(found)
    os._exit(0)  # gloo threads that outlive the interpreter abort a good run now and then


if __name__ == "__main__":
    main()
