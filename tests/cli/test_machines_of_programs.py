"""Launchers of several machines with ranks that only sleep: who stands by, and what outlives machine 0."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.cli.network import free_port
from tests.cli.small_run import ROOT

pytestmark = [pytest.mark.launcher, pytest.mark.slow]


class _Machines:
    """Launchers on loopback."""

    def __init__(self, folder: Path, least: int, most: int, *deeds: str) -> None:
        self.run_dir, self._folder = folder / "run", folder
        self.run_dir.mkdir()
        self._port, self._least, self._most, self._deeds = free_port(), least, most, deeds
        self.launchers: dict[int, subprocess.Popen] = {}

    def start(self, rank: int) -> None:
        numbers = map(str, (rank, self._port, self._least, self._most))
        command = [sys.executable, "-m", "tests.cli.machine_program", *numbers, str(self.run_dir)]
        with (self._folder / f"machine{rank}.log").open("ab") as log:
            self.launchers[rank] = subprocess.Popen(
                [*command, *self._deeds], cwd=ROOT, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self, found: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + 120
        while not found():
            assert "Traceback" not in self.said(), self.said()
            assert time.monotonic() < deadline, f"{what} did not come:\n{self.said()}"
            time.sleep(0.1)

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("machine*.log")))

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.run_dir / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["kind"] == kind]


@pytest.fixture
def made() -> Iterator[list[_Machines]]:
    all_made: list[_Machines] = []
    yield all_made
    for machines in all_made:
        for launcher in machines.launchers.values():
            launcher.kill()
            launcher.wait()


def test_a_machine_too_many_for_the_layout_stands_by_and_ends_well(
    tmp_path: Path, made: list[_Machines]
) -> None:
    machines = _Machines(tmp_path, 2, 4, "sleep")
    made.append(machines)
    for rank in range(3):
        machines.start(rank)
    machines.wait(lambda: machines.events("shrink"), "the shrink")
    told = machines.events("shrink")[0]
    assert (told["dp"], told["machines"], told["standing_by"]) == (2, 3, 1)
    machines.wait(lambda: machines.said().count(" ready") == 2, "two ranks")
    machines.launchers[0].send_signal(signal.SIGTERM)
    ends = {rank: launcher.wait(60) for rank, launcher in machines.launchers.items()}
    assert ends[0] == 0 and ends[2] == 0, machines.said()


def test_the_others_wait_for_machine_0_to_come_back(tmp_path: Path, made: list[_Machines]) -> None:
    machines = _Machines(tmp_path, 2, 2, "sleep")
    made.append(machines)
    for rank in range(2):
        machines.start(rank)
    machines.wait(lambda: machines.said().count(" ready") == 2, "two ranks")
    os.kill(machines.launchers[0].pid, signal.SIGKILL)
    machines.launchers[0].wait()
    machines.wait(lambda: "machine 0 does not answer" in machines.said(), "the loss")
    machines.start(0)
    machines.wait(lambda: machines.said().count(" ready") == 4, "two more ranks")
    for launcher in machines.launchers.values():
        launcher.send_signal(signal.SIGTERM)
    assert [launcher.wait(60) for launcher in machines.launchers.values()] == [0, 0], machines.said()
