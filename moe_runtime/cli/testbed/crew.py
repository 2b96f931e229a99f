"""Starts the rank processes of a measurement and hears them out.

Each rank holds one end of a socket pair (`testbed.line`), over which it asks for barriers and says its
results, one JSON object a line. The pair belongs to no network namespace, so nothing of this shows up on
the links that are being measured; the process group meets over a file, for the same reason.
"""

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from moe_runtime.cli.network import loopback_name
from moe_runtime.cli.testbed.links import INTERFACE, Testbed

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

    def tell(self, word: dict[str, Any] | None) -> None:
        try:
            self.line.sendall(json.dumps(word).encode() + b"\n")
        except BrokenPipeError as error:
            raise self.failed() from error

    def failed(self) -> RankFailed:
        code = self.process.wait()
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
        return RankFailed(f"bench: rank {self.number} ended with exit code {code}:\n{tail}")


class Crew:
    """Rank processes that are running.

    Args:
        ranks: in rank order.
        silence_s: a time in which no rank says a word ends the measurement.
    """

    def __init__(self, ranks: list[_Rank], silence_s: float) -> None:
        self._ranks = ranks
        self._silence_s = silence_s

    def ask(self, word: dict[str, Any]) -> list[dict[str, Any]]:
        """Tell all ranks the same, and hear what each makes of it, in rank order.

        Raises:
            RankFailed: a rank died, or all are silent.
        """
        for rank in self._ranks:
            rank.tell(word)
        results: dict[int, dict[str, Any]] = {}
        waiting: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for rank in self._ranks:
                selector.register(rank.line, selectors.EVENT_READ, rank)
            while len(results) < len(self._ranks):
                for rank, said in self._next_words(selector, waiting | set(results)):
                    if said is None:
                        waiting.add(rank.number)
                    else:
                        results[rank.number] = said
                        selector.unregister(rank.line)
                if len(waiting) == len(self._ranks):  # all have come to the barrier
                    waiting.clear()
                    for rank in self._ranks:
                        rank.tell(None)
        return [results[rank.number] for rank in self._ranks]

    def _next_words(
        self, selector: selectors.BaseSelector, done: set[int]
    ) -> list[tuple[_Rank, dict[str, Any] | None]]:
        ready = selector.select(timeout=self._silence_s)
        if not ready:
            late = sorted({rank.number for rank in self._ranks} - done)
            raise RankFailed(f"bench: no word from ranks {late} for {self._silence_s:.0f} s")
        words = []
        for key, _ in ready:
            rank: _Rank = key.data
            said = rank.words.readline()
            if not said:
                raise rank.failed()
            words.append((rank, json.loads(said)))
        return words


@contextmanager
def open_crew(
    module: str,
    size: int,
    folder: Path,
    silence_s: float,
    testbed: Testbed | None = None,
    node_of: Callable[[int], int] = lambda rank: rank,
) -> Iterator[Crew]:
    """Rank processes `python -m MODULE SOCKET RANK FOLDER`; killed after the context.

    Args:
        module: what each rank runs.
        size: ranks.
        folder: holds what ranks read, and their logs.
        silence_s: a time in which no rank says a word ends the measurement.
        testbed: namespaces to run in; None: here, over loopback.
        node_of: the node of each rank.
    """
    ranks: list[_Rank] = []
    try:
        for rank in range(size):
            inside = [] if testbed is None else testbed.inside(node_of(rank))
            interface = loopback_name() if testbed is None else INTERFACE
            ranks.append(_start(module, rank, folder, inside, interface))
        yield Crew(ranks, silence_s)
    finally:
        for each in ranks:
            each.process.kill()
            each.process.wait()
            each.words.close()
            each.line.close()


@contextmanager
def working_folder() -> Iterator[Path]:
    """A folder that ranks share; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def cpu_load() -> float:
    """How busy this machine is with anything, 0 to 1, over half a second; to be said beside the figures."""
    return psutil.cpu_percent(interval=0.5) / 100


def _start(module: str, rank: int, folder: Path, inside: list[str], interface: str | None) -> _Rank:
    ours, theirs = socket.socketpair()
    log = folder / f"rank{rank}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if interface is not None:
        environment["GLOO_SOCKET_IFNAME"] = interface
    with theirs, log.open("wb") as output:
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", module, str(theirs.fileno()), str(rank), str(folder)],
            env=environment,
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _Rank(rank, process, ours, ours.makefile("r", encoding="utf-8"), log)
