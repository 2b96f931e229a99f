"""Short training runs through the real command, on this machine or with a network namespace for each rank."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.cli.network import free_port
from moe_runtime.cli.testbed.links import Testbed
from moe_runtime.errors import ConfigError
from moe_runtime.planner.host.observed import Observed, observe

_PATIENCE_S = 300.0
_LAST_LINES = 3


@dataclass(frozen=True)
class Setting:
    """One run.

    Args:
        name: of its folder.
        overrides: of the config, such as `batch.seq_len=128`.
        rate_mbit: of the link of each rank, 10^6 bit/s; None: all ranks in one place, over loopback.
    """

    name: str
    overrides: tuple[str, ...] = ()
    rate_mbit: int | None = None


def train_run(
    config: str, setting: Setting, folder: Path, ranks: int, testbed: Testbed | None = None
) -> Observed:
    """Train and read what the run recorded.

    Args:
        config: run config.
        folder: where run folders are made.
        ranks: of the layout.
        testbed: with a node for each rank; every rank then has one core of its own.

    Raises:
        ConfigError: the run failed; its last lines.
    """
    command = ["train", config, f"name={setting.name}", f"out_dir={folder}", *setting.overrides, "--fresh"]
    launch = [sys.executable, "-m", "moe_runtime.cli.launch"]
    if testbed is None:
        processes = [[*launch, *command]]
    else:
        cores, port = sorted(os.sched_getaffinity(0)), free_port()
        meeting = ["--nnodes", str(ranks), "--master", f"10.83.0.1:{port}"]
        processes = [
            [
                *testbed.inside(rank),
                *("taskset", "-c", str(cores[rank % len(cores)])),
                *(*launch, *meeting, "--node-rank", str(rank), *command),
            ]
            for rank in range(ranks)
        ]
    log = folder / f"{setting.name}.log"
    _run_all(processes, log)
    return observe(folder / setting.name)


def _run_all(commands: Sequence[Sequence[str]], log: Path) -> None:
    with log.open("wb") as output:
        running = [
            subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            for command in commands
        ]
        try:
            codes = [process.wait(timeout=_PATIENCE_S) for process in running]
        except subprocess.TimeoutExpired:
            codes = [1]
        finally:
            for process in running:
                process.terminate()
                process.wait()
    if any(codes):
        last = " | ".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
        raise ConfigError(f"{log}: a short run ended with exit code {max(codes)}: {last}")
