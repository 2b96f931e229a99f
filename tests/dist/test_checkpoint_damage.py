"""Two hundred damaged checkpoints of two ranks: each is named and passed over; none is loaded, none runs code."""

import io
import pickle
import shutil
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from moe_runtime.checkpoint.folder import find_latest_good, open_checkpoint, verify_checkpoint
from moe_runtime.checkpoint.load import load_model
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.errors import CheckpointError
from tests.dist.checkpoint_damage import DAMAGES, Damage, gadgets, own_up, shards
from tests.dist.saved_by_two import save_steps, values
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    run_ranks(save_steps, 2, str(run_dir), (10, 20))
    return run_dir


def check_found_out(saved: Path, scratch: Path, damage: Damage, seed: int) -> None:
    """The newest checkpoint, damaged, is named, and the one before it is what comes back, to the bit."""
    run_dir = scratch / f"{damage.__name__}-{seed}"
    shutil.copytree(saved, run_dir, symlinks=True)
    newest, before = (run_dir / "checkpoints" / f"step_000000{step}" for step in (20, 10))
    names = damage(newest, before, Random(seed))
    found = find_latest_good(run_dir / "checkpoints")
    said = [str(skipped) for skipped in found.skipped]
    assert len(said) == 1 and any(name in said[0] for name in names), (damage.__name__, seed, said)
    assert "\n" not in said[0] and len(said[0]) < 700
    assert found.checkpoint is not None and found.checkpoint.manifest.step == 10
    for rank in range(2):
        name = f"layers.0.moe.experts.{rank}.down"
        ((_, tensor),) = read_tensors(found.checkpoint, [name])
        assert torch.equal(tensor, values(10, rank)[name])
    assert not list(run_dir.rglob("canary"))
    shutil.rmtree(run_dir)


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_kind_of_damage_is_found_out(saved: Path, tmp_path: Path, kind: str) -> None:
    for seed in range(3):
        check_found_out(saved, tmp_path, DAMAGES[kind], seed)


@pytest.mark.slow
def test_300_random_damages_are_found_out(saved: Path, tmp_path: Path) -> None:
    for trial in range(300):
        damage = list(DAMAGES.values())[trial % len(DAMAGES)]
        check_found_out(saved, tmp_path, damage, 1000 + trial)


def _load_as_its_users_would(data: bytes) -> None:
    """Load a gadget the way that runs it."""
    if data[:2] == b"PK":
        data = zipfile.ZipFile(io.BytesIO(data)).read("archive/data.pkl")
    if data[:6] == b"\x93NUMPY":
        np.load(io.BytesIO(data), allow_pickle=True)
    else:
        pickle.loads(data)


@pytest.mark.parametrize("kind", gadgets(Path("canary")))
def test_a_pickle_is_never_run(saved: Path, tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    gadget = gadgets(canary)[kind]
    for name in (shards("weights")[0], shards("optimizer")[1], "tokenizer.json", "manifest.json"):
        run_dir = tmp_path / f"run-{name}"
        shutil.copytree(saved, run_dir)
        newest = run_dir / "checkpoints" / "step_00000020"
        (newest / name).write_bytes(gadget)
        (newest / "model.pt").write_bytes(gadget)
        with pytest.raises(CheckpointError, match=name):
            open_checkpoint(newest)
        assert open_checkpoint(run_dir).manifest.step == 10
        if name.endswith("safetensors"):
            own_up(newest, name)
            with pytest.raises(CheckpointError, match=name):
                verify_checkpoint(newest, with_hash=False)
    for suffix in (".pt", ".pkl", ".distcp"):
        alone = tmp_path / f"folder{suffix}"
        alone.mkdir()
        (alone / f"__0_0{suffix}").write_bytes(gadget)
        for path in (alone, alone / f"__0_0{suffix}"):
            with pytest.raises(CheckpointError, match="can run code when it is loaded and is not read"):
                load_model(path)
    assert not canary.exists()
    _load_as_its_users_would(gadget)
    assert canary.exists(), "the gadget is a live one"
