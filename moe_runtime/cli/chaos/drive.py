"""Trains under faults through the same launcher that users start, and waits for each to be overcome.

The next fault comes only after the run has gone on from the last one: two at once are possible in life, but
then neither time could be told from the other. What a fault has to do to count as overcome depends on its
kind: a new attempt that does a step further, or the same attempt that goes on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil

from moe_runtime.cli.chaos.draw import CHANGING, PREEMPT, Draw
from moe_runtime.cli.chaos.report import Report, Struck
from moe_runtime.cli.chaos.watch import LOOK_S, Watch
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.train.inject import FAULTS_FILE

T = TypeVar("T")
_AHEAD = 2  # steps between the order of a fault and its stroke: every rank reads the order at a step's begin
_GOES_ON_S = 180.0  # without a step for so long the run hangs
_SIGNS = {
    "sigkill": "SIGKILL",
    "segfault": "SIGSEGV",
    "exit": "exit code",
    "raise": "InjectedFault",
    "sigstop": "stopped",
    "gil": "silent",
    "sleep": "stuck",
    "diskfull": "disk full",
}


class Overdue(Exception):
    """Something that had to happen did not."""


class Drive:
    """One run under faults.

    Args:
        command: what is launched, without the orders of faults.
        run_dir: of that run.
        draw: which faults come.
        report: is filled.
    """

    def __init__(self, command: list[str], run_dir: Path, draw: Draw, report: Report) -> None:
        self._run_dir, self._draw, self._report = run_dir, draw, report
        self._orders = run_dir.with_name(f"{run_dir.name}.faults")
        self._output = run_dir.with_name(f"{run_dir.name}.log")
        self._command = [
            sys.executable,
            "-m",
            "moe_runtime.cli.launch",
            *command,
            "--inject",
            f"@{self._orders}",
        ]
        self._watch = Watch(run_dir)
        self._family: set[int] = set()

    def run(self, seconds: float, mean_s: float) -> None:
        """Train with faults for so long, then ask the run to stop at a step."""
        self._orders.parent.mkdir(parents=True, exist_ok=True)
        self._orders.write_text("")
        begun = time.monotonic()
        self._launch("--fresh")
        try:
            self._until(lambda: self._watch.look() >= 1, "the first step")
            until = time.monotonic() + seconds
            while (pause := self._draw.pause(mean_s)) + time.monotonic() < until:
                time.sleep(pause)
                self._strike(self._draw.fault(self._watch.look() + _AHEAD))
            time.sleep(max(0.0, until - time.monotonic()))
            self._stop()
        except Overdue as overdue:
            self._report.failure = f"{overdue}; see {self._output}"
        finally:
            self._end(begun)

    def _launch(self, *options: str) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                [*self._command, *options],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _strike(self, fault: str) -> None:
        """Order a fault, and wait until the run has overcome it."""
        struck = Struck(fault, self._watch.look())
        self._report.struck.append(struck)
        if fault == PREEMPT:
            self._preempt(struck)
        else:
            kind, rank = fault.split(":")[0], int(fault.split(":")[1].removeprefix("rank"))
            known = len(self._faults())
            with self._orders.open("a") as orders:
                orders.write(f"{fault}\n")
            line = self._until(lambda: self._faults()[known:], f"{fault} to strike")[0]
            at = datetime.fromisoformat(line["time"]).timestamp()
            struck.step = line["step"]
            if kind in CHANGING:
                self._goes_on(struck, at, kind, rank, "skipped")
            elif kind == "diskfull":
                self._goes_on(struck, at, kind, rank, "checkpoint_failed")
            else:
                self._comes_back(struck, at, kind, rank)
        struck.survived = True
        self._look_at_launcher()

    def _goes_on(self, struck: Struck, at: float, kind: str, rank: int, sign: str) -> None:
        """The attempt itself goes on, and tells what it met."""
        event = self._until(lambda: self._after(at, sign), f"{struck.fault} to be told")[0]
        struck.detected_s = _seconds(event) - at
        struck.said = str(event.get("message") or event.get("cause") or sign)
        struck.attributed = f"rank {rank}" in struck.said
        struck.step, reached = int(event["step"]), self._watch.look()
        self._until(lambda: self._watch.look() > reached, f"a step after {struck.fault}")

    def _comes_back(self, struck: Struck, at: float, kind: str, rank: int) -> None:
        """A new attempt does a step."""
        event = self._until(lambda: self._after(at, "fault"), f"{struck.fault} to be detected")[0]
        reached = self._watch.look()
        struck.detected_s = _seconds(event) - at
        struck.said = str(event["cause"])
        struck.attributed = event["rank"] == rank and _SIGNS[kind] in struck.said
        self._recovered(struck, at, reached)

    def _preempt(self, struck: Struck) -> None:
        """Ask as a scheduler does, wait for the end, and start again."""
        at = time.time()
        self._stop()
        reached = self._watch.look()
        self._launch()
        self._recovered(struck, at, reached)

    def _recovered(self, struck: Struck, at: float, reached: int) -> None:
        resumed = self._until(lambda: self._after(at, "attempt"), f"an attempt after {struck.fault}")[-1]
        done = int(resumed["step"])
        struck.lost_steps = max(0, reached - done)

        def steps() -> bool:
            self._watch.look()
            return self._watch.stamps.get(done + 1, 0.0) > at

        self._until(steps, f"a step after {struck.fault}")
        struck.recovered_s = self._watch.stamps[done + 1] - at

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._until(
            lambda: self._process.poll() is not None, "the launcher to end after SIGTERM", alive=False
        )
        if self._process.returncode:
            raise Overdue(f"the launcher ended with {self._process.returncode} after SIGTERM")

    def _end(self, begun: float) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._report.wall_s = time.monotonic() - begun
        self._report.steps = self._watch.look()
        time.sleep(1.0)  # ranks that were killed last are being buried
        self._report.orphans = [pid for pid in self._family if _lives(pid)]
        for pid in self._report.orphans:
            psutil.Process(pid).kill()

    def _until(self, found: Callable[[], T], what: str, alive: bool = True) -> T:
        """Wait for something true.

        Raises:
            Overdue: it did not come in time, or the launcher ended before.
        """
        limit = time.monotonic() + _GOES_ON_S
        while not (value := found()):
            self._remember_family()
            if alive and self._process.poll() is not None:
                raise Overdue(f"expected {what}, but the launcher ended with {self._process.returncode}")
            if time.monotonic() > limit:
                raise Overdue(f"expected {what} within {_GOES_ON_S:.0f} s")
            time.sleep(LOOK_S)
        return value

    def _after(self, at: float, kind: str) -> list[dict[str, Any]]:
        return [event for event in self._watch.events(kind) if _seconds(event) >= at]

    def _faults(self) -> list[dict[str, Any]]:
        return [line for line in read_jsonl(self._run_dir / FAULTS_FILE) if "fault" in line]

    def _remember_family(self) -> None:
        """Every process that the launcher ever had, to see that none outlives it."""
        try:
            self._family |= {
                child.pid for child in psutil.Process(self._process.pid).children(recursive=True)
            }
        except psutil.NoSuchProcess:
            return

    def _look_at_launcher(self) -> None:
        """Open files and memory of the launcher, which lives through all attempts."""
        try:
            launcher = psutil.Process(self._process.pid)
            found = {
                "open files": float(launcher.num_fds()),
                "MiB": round(launcher.memory_info().rss / 2**20, 1),
            }
        except psutil.NoSuchProcess:
            return
        growth = self._report.growth
        is_new = self._process.pid not in self._family
        self._family.add(self._process.pid)
        for what, value in found.items():
            growth[what] = (value if is_new or what not in growth else growth[what][0], value)


def _seconds(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"]).timestamp()


def _lives(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and "moe_runtime" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
