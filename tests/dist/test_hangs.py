"""A rank that hangs in earnest is named by its rank, phase, action and microbatch, and all is written down."""

import json
import os
import signal
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moe_runtime.cli.supervise.hang import HangWatch, Verdict
from moe_runtime.cli.supervise.hang_dump import dump_hang
from moe_runtime.config.reliability import ReliabilityConfig
from moe_runtime.parallel.beat import read_beat
from moe_runtime.parallel.heartbeat import Heartbeat
from moe_runtime.train.fault import read_faults
from moe_runtime.train.inject import FAULTS_FILE, Injector, read_strikes
from tests.dist.layout_case import Case, batch, build, run_lane
from tests.ranks import run_ranks

CASE = Case("dualpipe", {"pp": 2, "schedule": "dualpipe"}, 4)
BEAT_S = 0.3
LIMIT_S = 1.0  # of every phase that recurs
STEPS = 6


def _train(rank: int, world_size: int, folder: Path, text: str) -> list[str]:
    """Steps with their data and a reduction of gradients, so that ranks wait for each other."""
    with Heartbeat(folder, rank, BEAT_S) as heartbeat:
        runtime = build(CASE, rank)
        progress = runtime.clock.progress
        heartbeat.follow(progress)
        injector = Injector(read_faults([text]), rank, folder)
        injector.listen(progress, None)
        for step in range(1, STEPS + 1):
            progress.begins_step(step)
            tokens = batch(runtime.config, step)
            progress.enters("step")
            run_lane(runtime, tokens)
            progress.enters("optimizer")
            dist.all_reduce(torch.ones(1))
        progress.enters("save")
        dist.barrier()
        return injector.left()


def _watch(folder: Path, found: list[Verdict], done: threading.Event) -> None:
    """What a launcher does: wait for the heartbeats, look, dump, kill."""
    while not done.is_set() and not all(read_beat(folder / f"rank{rank}.heartbeat") for rank in (0, 1)):
        time.sleep(0.02)
    beats = [read_beat(folder / f"rank{rank}.heartbeat") for rank in (0, 1)]
    pids = {rank: beat.pid for rank, beat in enumerate(beats) if beat is not None}
    limits = dict.fromkeys(("data", "optimizer"), LIMIT_S)
    reliability = ReliabilityConfig(heartbeat_s=BEAT_S, limits=limits)
    watch = HangWatch(folder, pids, reliability, LIMIT_S)
    while not done.wait(0.05):
        verdict = watch.look()
        if verdict is not None:
            found.append(verdict)
            struck = read_strikes(folder / FAULTS_FILE)
            (folder / "seconds").write_text(str(time.time() - _time_of(struck[0]["time"]) if struck else -1))
            dump_hang(watch, verdict, folder / "hang", BEAT_S)
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            return


def _time_of(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def hang(folder: Path, text: str) -> Verdict:
    """Let a fault strike; gives who was named, after everything was dumped and the ranks were killed."""
    found: list[Verdict] = []
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(folder, found, done))
    watch.start()
    try:
        with pytest.raises(AssertionError, match="died with exit code -9"):
            run_ranks(_train, 2, folder, text, timeout_s=60)
    finally:
        done.set()
        watch.join()
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("text", "kind", "beats"),
    [
        ("gil:rank1:step3:dispatch", "silent", 3),
        ("sleep:rank0:step3:combine", "stuck", 3 + LIMIT_S / BEAT_S),
        pytest.param("sigstop:rank0:step3:backward", "stopped", 3, marks=pytest.mark.slow),
        pytest.param("sleep:rank0:step3:data", "stuck", 3 + LIMIT_S / BEAT_S, marks=pytest.mark.slow),
        pytest.param("sleep:rank0:step3:forward", "stuck", 3 + LIMIT_S / BEAT_S, marks=pytest.mark.slow),
        pytest.param("sleep:rank1:step3:data", "stuck", 3 + LIMIT_S / BEAT_S, marks=pytest.mark.slow),
    ],
)
def test_a_hung_rank_is_named_and_everything_is_dumped(
    text: str, kind: str, beats: float, tmp_path: Path
) -> None:
    verdict = hang(tmp_path, text)
    (truth,) = read_strikes(tmp_path / FAULTS_FILE)
    assert (verdict.rank, verdict.kind, verdict.step) == (truth["rank"], kind, 3), verdict
    assert verdict.action == ", ".join(filter(None, (truth["entry"], truth["part"])))
    assert verdict.phase == ("data" if truth["phase"] == "data" else "step")
    assert float((tmp_path / "seconds").read_text()) < 5 * beats * BEAT_S  # five times what is promised
    into = tmp_path / "hang"
    assert json.loads((into / "verdict.json").read_text())["rank"] == verdict.rank
    assert set(json.loads((into / "ranks.json").read_text())) == {"rank0", "rank1"}
    for rank in (0, 1):
        assert "most recent call first" in (into / f"rank{rank}.stacks").read_text()
    assert "in _train" in (into / f"rank{verdict.rank}.stacks").read_text()
    entries = json.loads((into / f"rank{1 - verdict.rank}.flight").read_text())["entries"]
    assert any(entry["profiling_name"] == "gloo:all_reduce" for entry in entries)


def test_ranks_that_go_on_are_not_named(tmp_path: Path) -> None:
    found: list[Verdict] = []
    done = threading.Event()
    watch = threading.Thread(target=_watch, args=(tmp_path, found, done))
    watch.start()
    try:
        left = run_ranks(_train, 2, tmp_path, "sigkill:rank1:step99:data", timeout_s=60)
    finally:
        done.set()
        watch.join()
    assert found == [] and left == [[], ["sigkill:rank1:step99:data"]]
