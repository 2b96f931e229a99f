"""A process killed at any moment of a save leaves a checkpoint that loads, and nothing like one."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch

from moe_runtime.checkpoint.background import BackgroundSaver
from moe_runtime.checkpoint.folder import find_latest_good
from moe_runtime.checkpoint.tensors import read_tensors
from tests.unit.checkpoint.samples import META, contribution, open_store, save, weights


def _save_for_ever(run_dir: Path, ready: int) -> None:
    saver = BackgroundSaver(open_store(run_dir, keep=2))
    for step in range(11, 1_000_000):
        saver.start(step, contribution(step), META)
        saver.wait()
        os.write(ready, b"!")


def _kill_during_saves(run_dir: Path, delay_s: float) -> None:
    """Let a child save checkpoint after checkpoint, and kill it `delay_s` after the first one."""
    readable, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _save_for_ever(run_dir, ready)
        finally:
            os._exit(1)
    os.read(readable, 1)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(readable)
    os.close(ready)


def _kill_and_look(run_dir: Path, kills: int) -> set[str]:
    """Kill at random microseconds; gives the kinds of half-done saves that were met."""
    save(run_dir, 10)
    chance, met = Random(0), set()
    folder = run_dir / "checkpoints"
    for _ in range(kills):
        _kill_during_saves(run_dir, chance.randrange(40_000) * 1e-6)
        met |= {path.name[:5] for path in folder.iterdir() if path.name.startswith(".")}
        found = find_latest_good(folder)
        assert found.checkpoint is not None and not found.skipped
        step = found.checkpoint.manifest.step
        read = dict(read_tensors(found.checkpoint, ["embed.weight"]))
        assert torch.equal(read["embed.weight"], weights(step)["embed.weight"]) and step > 10
        open_store(run_dir)
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return met


def test_a_kill_at_any_moment_of_a_save_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    _kill_and_look(tmp_path, kills=6)


@pytest.mark.slow
def test_a_kill_at_any_of_50_moments_of_a_save_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    assert ".tmp-" in _kill_and_look(tmp_path, kills=50), "no kill fell into a save"
