"""Real runs that save after every step while a disk is slow, full, or full at the end."""

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe_runtime.open_run import open_run
from moe_runtime.checkpoint.folder import verify_checkpoint
from moe_runtime.config.load import load_config
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.world import World
from moe_runtime.train.loop import Run, train
from tests.cli.small_run import write_config
from tests.ranks import run_ranks

STEPS = 3
SLOW_S = 0.3


def _slow(run: Run, rank: int) -> Callable[[str], object]:
    """The disk of rank 1 needs longer than a step."""
    return lambda point: time.sleep(SLOW_S) if (rank, point) == (1, "write") else None


def _full_at(step: int) -> Callable[[Run, int], Callable[[str], object]]:
    """Rank 0 finds no room in the save of one step."""

    def disk(run: Run, rank: int) -> Callable[[str], object]:
        def at(point: str) -> None:
            if (rank, point, run.checkpoints.saver.running_step) == (0, "rename", step):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return at

    return disk


DISKS: dict[str, Callable[[Run, int], Callable[[str], object]]] = {
    "slow": _slow,
    "full": _full_at(2),
    "full_at_end": _full_at(1),
}


def _train_on_each_disk(rank: int, world_size: int, config: str) -> dict[str, str | None]:
    """How each run ended, by the name of its disk."""
    ended: dict[str, str | None] = {}
    for name, disk in DISKS.items():
        world = World(rank, world_size, rank, world_size, torch.device("cpu"))
        steps = 1 if name == "full_at_end" else STEPS
        overrides = (f"name={name}", f"train.total_steps={steps}")
        run = open_run(load_config(config, overrides), world, fresh=False)
        run.checkpoints.saver.store.at = disk(run, rank)
        try:
            train(run)
        except CheckpointError as error:
            ended[name] = str(error)
        else:
            ended[name] = None
    return ended


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str | None]]]:
    folder = tmp_path_factory.mktemp("disks")
    changes = {"train__checkpoint_every": 1, "train__keep_checkpoints": STEPS}
    config = write_config(folder, layout={"dp": 2, "ep": 2}, train__eval_every=0, **changes)
    return folder / "runs", run_ranks(_train_on_each_disk, 2, str(config))


def events(run_dir: Path, kind: str) -> list[dict]:
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def digests(run_dir: Path, step: int) -> dict[str, str]:
    files = verify_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}").manifest.files
    return {name: entry.sha256 for name, entry in files.items()}


def test_a_slow_disk_is_waited_for_and_told_and_no_checkpoint_is_dropped(
    runs: tuple[Path, list[dict[str, str | None]]],
) -> None:
    slow = runs[0] / "slow"
    saved = events(slow, "checkpoint")
    assert [event["step"] for event in saved] == list(range(1, STEPS + 1))
    assert all(event["write_s"] >= SLOW_S and event["blocked_s"] > 0 for event in saved)
    waited = events(slow, "checkpoint_waited")
    assert waited and all(event["running_step"] == event["step"] - 1 for event in waited)
    assert sum(event["seconds"] for event in waited) > 0


def test_a_full_disk_costs_one_checkpoint_and_the_run_ends_well(
    runs: tuple[Path, list[dict[str, str | None]]],
) -> None:
    full, slow = runs[0] / "full", runs[0] / "slow"
    (failed,) = events(full, "checkpoint_failed")
    assert failed["step"] == 2 and "disk full (No space left on device): need" in failed["message"]
    assert [event["step"] for event in events(full, "checkpoint")] == [1, 3]
    assert not list((full / "checkpoints").glob(".*"))
    for step in (1, 3):  # whatever was changed while a slow disk wrote
        assert digests(full, step) == digests(slow, step)


def test_a_run_that_ends_without_its_last_checkpoint_has_not_ended_well(
    runs: tuple[Path, list[dict[str, str | None]]],
) -> None:
    first, other = runs[1]
    assert first == other, "alike on every rank"
    assert [first[name] for name in ("slow", "full")] == [None, None]
    assert "step 1: no checkpoint: rank 0: disk full" in str(first["full_at_end"])
    assert "it continues" in str(first["full_at_end"])
