"""A run on two machines that are network namespaces, and what is done to them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from moe_runtime.cli.testbed.links import INTERFACE, Testbed
from tests.cli.small_run import ROOT, steps_done

_GOES_ON_S = 180.0


class TwoMachines:
    """Starts, kills and cuts off two launchers of one run.

    Args:
        testbed: two nodes.
        folder: for logs; the run's own is below it.
        command: `train CONFIG ...`.
        options: of the launcher; --node-rank is added.
    """

    def __init__(self, testbed: Testbed, folder: Path, command: list[str], options: list[str]) -> None:
        self._testbed, self._folder, self._command, self._options = testbed, folder, command, options
        self.run_dir = folder / "runs" / "small"
        self.launchers: dict[int, subprocess.Popen] = {}

    def start(self, node: int) -> None:
        """Start the launcher of a machine."""
        options = [*self._options, "--node-rank", str(node)]
        module = [sys.executable, "-m", "moe_runtime.cli.launch"]
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        with (self._folder / f"machine{node}.log").open("ab") as log:
            self.launchers[node] = subprocess.Popen(
                [*self._testbed.inside(node), *module, *options, *self._command],
                cwd=ROOT,
                env=environment | {"OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, node: int) -> None:
        """End everything on a machine at once."""
        launcher = psutil.Process(self.launchers[node].pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        self.launchers[node].wait()

    def link(self, node: int, state: str) -> None:
        """Cut (`down`) or heal (`up`) a machine's link."""
        command = [*self._testbed.inside(node), "ip", "link", "set", INTERFACE, state]
        subprocess.run(command, check=True)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Of the run, so far."""
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] in kinds]

    def wait(self, found: Callable[[], Any], what: str) -> float:
        """Wait until something is true; gives the seconds."""
        begin = time.monotonic()
        while not found():
            assert time.monotonic() - begin < _GOES_ON_S, f"{what} did not come:\n{self.logs()}"
            time.sleep(0.05)
        return time.monotonic() - begin

    def goes_on(self, attempt: int, steps: int = 2) -> float:
        """Wait until an attempt has done some steps; gives the seconds."""

        def goes() -> bool:
            begun = [event for event in self.events("attempt") if event["attempt"] >= attempt]
            return bool(begun) and max([0, *steps_done(self.run_dir)]) >= begun[-1]["step"] + steps

        return self.wait(goes, f"step {steps} of attempt {attempt}")

    def ends(self) -> list[int]:
        """Wait for the launchers; gives their exit codes."""
        return [self.launchers[node].wait(_GOES_ON_S) for node in sorted(self.launchers)]

    def stop(self) -> list[int]:
        """Ask machine 0 to stop the run; gives all exit codes."""
        # `nsenter` becomes the launcher, so this is its own process.
        self.launchers[0].send_signal(signal.SIGTERM)
        return self.ends()

    def logs(self) -> str:
        """What both machines said."""
        return "\n".join(path.read_text()[-4000:] for path in sorted(self._folder.glob("machine*.log")))

    def end_all(self) -> None:
        """Kill what still lives."""
        for node, launcher in self.launchers.items():
            if launcher.poll() is None:
                self.kill(node)


@contextmanager
def two_machines(
    testbed: Testbed, folder: Path, command: list[str], options: list[str]
) -> Iterator[TwoMachines]:
    """Two machines that have both been told to run."""
    machines = TwoMachines(testbed, folder, command, options)
    try:
        for node in (0, 1):
            machines.start(node)
        yield machines
    finally:
        machines.end_all()
