"""A whole `train` on forked ranks under a small launcher: everything that a fault meets, in a few seconds.

The ranks are those of the command line, with torch imported beforehand. What watches them does what the
launcher's agent does: exit codes, the hang watch, two seconds for last words, then the end of all.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from moe_runtime.cli.launch import network
from moe_runtime.cli.supervise.blame import Blame, find_blame
from moe_runtime.cli.supervise.hang import HangWatch, Verdict
from moe_runtime.cli.supervise.outcome import Outcome, explain_end, read_statuses
from moe_runtime.config.load import load_config
from moe_runtime.parallel.heartbeat import STATUS_DIR
from moe_runtime.train.inject import FAULTS_FILE, read_strikes
from tests.ranks import FORKED

LOOK_S, LAST_WORDS_S, LIMIT_S = 0.05, 2.0, 240.0


@dataclass(frozen=True)
class Ended:
    """How it went.

    Args:
        codes: of the ranks that failed by themselves.
        struck: lines of faults.jsonl.
        noticed_s: from the first stroke until the first sign of it.
    """

    codes: Mapping[int, int]
    struck: list[dict[str, Any]]
    outcome: Outcome
    blame: Blame
    hang: Verdict | None
    noticed_s: float


def _rank(rank: int, arguments: list[str], environment: dict[str, str], output: Path) -> None:
    from moe_runtime.cli.app import main

    os.setsid()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    sys.argv = ["moe-runtime", *arguments]
    main()


def train_under_faults(config: Path, folder: Path, world_size: int, *arguments: str) -> Ended | None:
    """Run until the end (None) or until a fault has been noticed and everything was ended.

    Args:
        folder: of what the ranks leave; new.
        arguments: of `train` after its config.
    """
    folder.mkdir()
    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    run = load_config(str(config), overrides)
    port = network.free_port()
    environment = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {STATUS_DIR: str(folder), "GLOO_SOCKET_IFNAME": "lo"}
    words = ["train", str(config), *arguments]
    ranks = {
        rank: FORKED.Process(target=_rank, args=(rank, words, environment, folder / "output"), daemon=True)
        for rank in range(world_size)
    }
    for process in ranks.values():
        process.start()
    pids = {rank: process.pid or 0 for rank, process in ranks.items()}
    watch = HangWatch(folder, pids, run.reliability, run.train.watchdog_s, world_size)
    try:
        noticed = _until_noticed(ranks, watch, folder / "output")
        if noticed is None:
            return None
        codes, hang, at = noticed
    finally:
        for rank, process in ranks.items():
            with suppress(ProcessLookupError):
                os.kill(pids[rank], signal.SIGKILL)
            process.join()
    statuses = read_statuses(folder)
    if hang is not None:
        outcome = Outcome(3, hang.text, rank=hang.rank)
    else:
        outcome = explain_end(codes, statuses, interrupted=False)
    struck = read_strikes(Path(run.out_dir) / run.name / FAULTS_FILE)
    first = datetime.fromisoformat(struck[0]["time"]).timestamp() if struck else at
    return Ended(codes, struck, outcome, find_blame(outcome, codes, statuses, hang, folder), hang, at - first)


def _until_noticed(
    ranks: Mapping[int, multiprocessing.process.BaseProcess], watch: HangWatch, output: Path
) -> tuple[dict[int, int], Verdict | None, float] | None:
    """Exit codes or a verdict, and when; None if all ranks end well."""
    until = time.monotonic() + LIMIT_S
    while True:
        time.sleep(LOOK_S)
        codes = {rank: process.exitcode for rank, process in ranks.items()}
        if any(codes.values()):
            at, last = time.time(), time.monotonic() + LAST_WORDS_S
            while None in (codes := {rank: each.exitcode for rank, each in ranks.items()}).values():
                if time.monotonic() > last:
                    break
                time.sleep(LOOK_S)
            return {rank: code for rank, code in codes.items() if code}, None, at
        if all(code == 0 for code in codes.values()):
            return None
        verdict = watch.look()
        if verdict is not None:
            return {}, verdict, time.time()
        assert time.monotonic() < until, output.read_text()
