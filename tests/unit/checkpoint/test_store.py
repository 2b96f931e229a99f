"""Saving is whole or not at all; what comes back is bit for bit what went in."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_runtime.checkpoint import disk
from moe_runtime.checkpoint.folder import find_latest_good, open_checkpoint
from moe_runtime.checkpoint.optimizer import read_partitions
from moe_runtime.checkpoint.store import Contribution, Saved, SaveFailed
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.errors import CheckpointError
from tests.unit.checkpoint.samples import META, contribution, open_store, partition, save, weights


def steps_on_disk(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_saved_tensors_come_back_bitwise(tmp_path: Path) -> None:
    assert isinstance(save(tmp_path, 10), Saved)
    checkpoint = open_checkpoint(tmp_path)
    read = dict(read_tensors(checkpoint, weights(10)))
    for name, tensor in weights(10).items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)
    (state,) = read_partitions(checkpoint, 0).values()
    expected = partition(10)
    assert (state.layout, state.start, state.end) == (expected.layout, expected.start, expected.end)
    assert state.scalars == expected.scalars
    assert state.tensors.keys() == expected.tensors.keys()
    for key, tensor in expected.tensors.items():
        assert torch.equal(state.tensors[key].view(torch.uint8), tensor.view(torch.uint8))


def test_manifest_says_what_the_run_was(tmp_path: Path) -> None:
    save(tmp_path, 10)
    manifest = open_checkpoint(tmp_path).manifest
    assert (manifest.step, manifest.tokens) == (10, META.tokens)
    assert (manifest.config, manifest.layout, manifest.state) == (META.config, META.layout, META.state)
    assert (
        open_checkpoint(tmp_path / "checkpoints" / "step_00000010").extra("tokenizer.json").startswith(b"{")
    )


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert steps_on_disk(tmp_path) == ["step_00000030", "step_00000040"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    flipped = tmp_path / "checkpoints" / "step_00000020" / "weights-00000.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    store = open_store(tmp_path, keep=2)
    assert store.latest_good().checkpoint is not None
    store.save(30, contribution(30), META)
    assert "step_00000010" in steps_on_disk(tmp_path)


def test_a_step_can_be_saved_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    store = open_store(tmp_path)
    assert isinstance(store.save(10, contribution(11), META), Saved)
    read = dict(read_tensors(open_checkpoint(tmp_path), ["embed.weight"]))
    assert torch.equal(read["embed.weight"], weights(11)["embed.weight"])
    assert steps_on_disk(tmp_path) == ["step_00000010"]


def test_leftovers_of_a_killed_save_are_removed_at_start(tmp_path: Path) -> None:
    save(tmp_path, 10)
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step_00000020").mkdir()
    (folder / ".tmp-step_00000020" / "weights-00000.safetensors").write_bytes(b"half")
    (folder / "step_00000010").rename(folder / ".old-step_00000010")
    open_store(tmp_path)
    assert steps_on_disk(tmp_path) == ["step_00000010"]
    assert find_latest_good(folder).checkpoint is not None


def test_clear_removes_every_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 10)
    open_store(tmp_path).clear()
    assert steps_on_disk(tmp_path) == []


def test_a_dtype_that_cannot_be_stored_fails_the_save_and_leaves_nothing(tmp_path: Path) -> None:
    odd = Contribution({"embed.weight": torch.zeros(2, dtype=torch.complex64)})
    outcome = open_store(tmp_path).save(10, odd, META)
    assert isinstance(outcome, SaveFailed) and "complex64" in outcome.message
    assert steps_on_disk(tmp_path) == []


def test_a_checkpoint_larger_than_the_free_space_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)
    monkeypatch.setattr("moe_runtime.checkpoint.store.free_bytes", lambda folder: 1_000_000)
    big = Contribution({"embed.weight": torch.zeros(1_000_000)})
    outcome = open_store(tmp_path).save(20, big, META)
    assert isinstance(outcome, SaveFailed)
    assert outcome.message.startswith("disk full: need 4.0 MB, have 1.0 MB in ")
    assert steps_on_disk(tmp_path) == ["step_00000010"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("knows_free_space", [True, False])
def test_a_full_disk_costs_the_checkpoint_and_leaves_no_partial_file(
    small_disk: Path, knows_free_space: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(save(small_disk, 10), Saved)
    if not knows_free_space:  # a quota, or another process that takes the room meanwhile
        free = disk.free_bytes
        answers = iter([1 << 40])
        monkeypatch.setattr(
            "moe_runtime.checkpoint.store.free_bytes", lambda folder: next(answers, None) or free(folder)
        )
    big = Contribution({"embed.weight": torch.ones(4 << 20, dtype=torch.uint8)})
    outcome = open_store(small_disk).save(20, big, META)
    assert isinstance(outcome, SaveFailed)
    assert "disk full" in outcome.message and ": need 4.2 MB, have " in outcome.message
    assert steps_on_disk(small_disk) == ["step_00000010"]
    found = find_latest_good(small_disk / "checkpoints")
    assert found.checkpoint is not None and found.checkpoint.manifest.step == 10


def test_a_folder_that_cannot_be_written_fails_the_save_with_the_reason(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    (tmp_path / "checkpoints").write_text("a file in the way")
    outcome = store.save(10, contribution(10), META)
    assert isinstance(outcome, SaveFailed) and "checkpoints" in outcome.message
    assert "\n" not in outcome.message


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        open_checkpoint(tmp_path)
    assert find_latest_good(tmp_path / "checkpoints").checkpoint is None
