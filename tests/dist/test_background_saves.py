"""Saves of several ranks behind their training: one slow disk, one rank that dies."""

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_runtime.checkpoint.background import BackgroundSaver
from moe_runtime.checkpoint.folder import find_latest_good
from moe_runtime.checkpoint.store import CheckpointStore, Saved
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.cli.supervise.stacks import only_waits
from moe_runtime.parallel.peers import Peers
from tests.dist.saved_by_two import META, contribution, values
from tests.ranks import run_ranks


def _saver(rank: int, world_size: int, run_dir: str) -> BackgroundSaver:
    peers = Peers(rank, world_size, None).over_group_of_their_own(60.0)
    return BackgroundSaver(CheckpointStore(Path(run_dir), peers, 2))


def _train_while_one_disk_is_slow(rank: int, world_size: int, run_dir: str) -> Any:
    """Collectives of the training go on while rank 1 writes; the save is done when its disk is."""
    saver, opened = _saver(rank, world_size, run_dir), threading.Event()
    saver.store.at = lambda point: opened.wait(60) if (rank, point) == (1, "write") else None
    saver.start(10, contribution(10, rank), META)
    total = torch.ones(1)
    for _ in range(20):
        dist.all_reduce(total)
        assert saver.take() is None
    opened.set()
    report = saver.wait()
    assert report is not None and isinstance(report.outcome, Saved)
    return [float(total), report.blocked_s]


def test_the_training_goes_on_while_one_rank_has_a_slow_disk(tmp_path: Path) -> None:
    (total, blocked_s), (_, told_s) = run_ranks(_train_while_one_disk_is_slow, 2, str(tmp_path))
    assert total == 2.0**20
    assert blocked_s == told_s, "the longest of all ranks, on every rank"


def _wait_while_one_disk_hangs(rank: int, world_size: int, run_dir: str) -> bool:
    """Whether the rank's own thread says that it only waits for other ranks."""
    saver, own = _saver(rank, world_size, run_dir), threading.get_ident()
    reached, opened = threading.Event(), threading.Event()

    def at(point: str) -> None:
        reached.set()
        if (rank, point) == (1, "write"):
            opened.wait(60)

    saver.store.at = at
    stacks = [Path(run_dir) / f"stacks{number}" for number in range(world_size)]

    def look() -> None:
        reached.wait(60)
        while saver.store.waits_for_others != (rank == 0):
            time.sleep(0.05)
        time.sleep(0.5)  # longer than the rank's own thread looks away
        with stacks[rank].open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        stacks[rank].with_suffix(".done").touch()
        while not all(path.with_suffix(".done").exists() for path in stacks):
            time.sleep(0.05)
        opened.set()

    saver.start(10, contribution(10, rank), META)
    looker = threading.Thread(target=look)
    looker.start()
    saver.wait()
    looker.join()
    return only_waits(stacks[rank].read_text(), own)


def test_a_rank_whose_disk_hangs_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    assert run_ranks(_wait_while_one_disk_hangs, 2, str(tmp_path)) == [True, False]


def _die_while_writing(rank: int, world_size: int, run_dir: str, after_us: int) -> None:
    saver = _saver(rank, world_size, run_dir)
    saver.start(10, contribution(10, rank), META)
    saver.wait()
    dist.barrier()
    if rank == 1:
        timer = threading.Timer(after_us * 1e-6, os.kill, (os.getpid(), signal.SIGKILL))
        timer.start()
    begun = time.monotonic()
    try:
        for step in range(11, 100_000):
            saver.start(step, contribution(step, rank), META)
            saver.wait()
    except RuntimeError as error:
        told = f"{time.monotonic() - begun:.3f} {str(error).splitlines()[0]}"
        (Path(run_dir) / "told").write_text(told)
        raise


def _kill_one_of_two(run_dir: Path, after_us: int) -> float:
    """Kill rank 1 in its saves; gives the seconds until rank 0 was told."""
    with pytest.raises(AssertionError, match=r"rank 1 died|rank 0 raised"):
        run_ranks(_die_while_writing, 2, str(run_dir), after_us)
    deadline = time.monotonic() + 10
    while not (run_dir / "told").exists():
        assert time.monotonic() < deadline, "rank 0 was never told"
        time.sleep(0.01)
    found = find_latest_good(run_dir / "checkpoints")
    assert found.checkpoint is not None and not found.skipped
    step = found.checkpoint.manifest.step
    for rank in range(2):
        name = f"layers.0.moe.experts.{rank}.down"
        ((_, tensor),) = read_tensors(found.checkpoint, [name])
        assert torch.equal(tensor, values(step, rank)[name])
    return float((run_dir / "told").read_text().split()[0]) - after_us * 1e-6


def test_a_rank_that_dies_in_a_save_is_told_to_the_others_by_their_own_wait(tmp_path: Path) -> None:
    assert _kill_one_of_two(tmp_path, 30_000) < 10


@pytest.mark.slow
def test_20_ranks_killed_in_a_save_leave_a_loadable_checkpoint(tmp_path: Path) -> None:
    chance = Random(1)
    for trial in range(20):
        run_dir = tmp_path / str(trial)
        run_dir.mkdir()
        assert _kill_one_of_two(run_dir, chance.randrange(60_000)) < 10
