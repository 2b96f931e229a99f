"""Starts the rank processes of a measurement and hears them out.

Each rank holds one end of a socket pair, over which it asks for barriers and says its result, one JSON
object a line. The pair belongs to no network namespace, so nothing of this shows up on the links that
are being measured; the process group meets over a file, for the same reason.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from moe_runtime.cli.bench_comm.network import INTERFACE, open_testbed
from moe_runtime.cli.bench_comm.settings import Settings
from moe_runtime.cli.network import loopback_name

_LOG_LINES = 15


class RankFailed(RuntimeError):
    """A rank of the benchmark ended before it had said its result."""


@dataclass
class _Rank:
    number: int
    process: subprocess.Popen
    line: socket.socket
    words: TextIO
    log: Path

    def failed(self) -> RankFailed:
        code = self.process.wait()
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return RankFailed(f"bench comm: rank {self.number} ended with exit code {code}:\n{tail}")


def run_crew(settings: Settings, folder: Path, silence_s: float) -> list[dict[str, Any]]:
    """Run one measurement on as many processes as it has ranks.

    Args:
        settings: of the measurement; with a rate, ranks run in namespaces joined by links.
        folder: holds what ranks read; they get its path.
        silence_s: a time in which no rank says a word ends it.

    Returns:
        What each rank said, in rank order.

    Raises:
        ConfigError: links cannot be made.
        RankFailed: a rank died or all are silent; the others are ended.
    """
    with _place(settings) as inside:
        ranks = [_start(rank, settings, folder, inside) for rank in range(settings.world_size)]
        try:
            return _hear(ranks, silence_s)
        finally:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()
                rank.words.close()
                rank.line.close()


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder that ranks share; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-comm-") as folder:
        yield Path(folder)


@contextmanager
def _place(settings: Settings) -> Iterator[Callable[[int], list[str]]]:
    """Where ranks run: gives what to put before the command of a rank."""
    if settings.rate_mbit is None:
        yield lambda rank: []
        return
    with open_testbed(settings.nodes, settings.rate_mbit) as testbed:
        yield lambda rank: testbed.inside(settings.node_of(rank))


def _start(rank: int, settings: Settings, folder: Path, inside: Callable[[int], Sequence[str]]) -> _Rank:
    ours, theirs = socket.socketpair()
    log = folder / f"rank{rank}.log"
    interface = INTERFACE if settings.rate_mbit is not None else loopback_name()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface
    module = "moe_runtime.cli.bench_comm.rank"
    with theirs, log.open("wb") as output:
        process = subprocess.Popen(
            [*inside(rank), sys.executable, "-m", module, str(theirs.fileno()), str(rank), str(folder)],
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    ours.sendall(json.dumps(settings.to_plain()).encode() + b"\n")
    return _Rank(rank, process, ours, ours.makefile("r", encoding="utf-8"), log)


def _hear(ranks: list[_Rank], silence_s: float) -> list[dict[str, Any]]:
    """Let barriers pass when all have come to them; collect results."""
    results: dict[int, dict[str, Any]] = {}
    waiting: set[int] = set()
    with selectors.DefaultSelector() as selector:
        for each in ranks:
            selector.register(each.line, selectors.EVENT_READ, each)
        while len(results) < len(ranks):
            ready = selector.select(timeout=silence_s)
            if not ready:
                late = sorted({each.number for each in ranks} - waiting - set(results))
                raise RankFailed(f"bench comm: no word from ranks {late} for {silence_s:.0f} s")
            for key, _ in ready:
                rank: _Rank = key.data
                said = rank.words.readline()
                if not said:
                    raise rank.failed()
                word = json.loads(said)
                if word is None:
                    waiting.add(rank.number)
                else:
                    results[rank.number] = word
                    selector.unregister(rank.line)
            if len(waiting) == len(ranks):
                waiting.clear()
                for each in ranks:
                    each.line.sendall(b"\n")
    return [results[each.number] for each in ranks]


def cpu_load() -> float:
    """How busy this machine is with anything, 0 to 1, over half a second; to be said beside the figures."""
    return psutil.cpu_percent(interval=0.5) / 100
