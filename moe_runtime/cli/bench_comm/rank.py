"""One rank process: `python -m moe_runtime.cli.bench_comm.rank SOCKET RANK FOLDER`; started by `crew`."""

import json
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.orphan import stop_with_parent

_PATIENCE = timedelta(minutes=10)


class Line:
    """The way to the process that started this one.

    Args:
        number: file descriptor of this rank's end of the socket pair.
    """

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._words = self._socket.makefile("r", encoding="utf-8")

    def settings(self) -> Settings:
        """What to measure; said first."""
        return Settings.from_plain(json.loads(self._words.readline()))

    def barrier(self) -> None:
        """Wait until all ranks are here; no byte of this crosses a link."""
        self.say(None)
        if not self._words.readline():
            sys.exit("the benchmark has ended")

    def say(self, word: dict[str, Any] | None) -> None:
        """Say a result; None asks for a barrier."""
        self._socket.sendall(json.dumps(word).encode() + b"\n")


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
    settings = line.settings()
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
