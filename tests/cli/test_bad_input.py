"""What a user or a disk can do wrong, through the real launcher: exit 2, one line, no traceback, no hang."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.small_run import run, steps_done, write_config

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps with checkpoints at 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    code, output = run("train", str(write_config(folder, train__total_steps=4)))
    assert code == 0, output
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; gives the folder, with a config that points into it."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.copytree(finished / "data", tmp_path / "data")
    return tmp_path


def _refused(*arguments: str) -> str:
    """The one line of a refused command."""
    code, output = run(*arguments)
    assert code == 2, output
    assert "Traceback" not in output
    lines = [line for line in output.splitlines() if line.strip()]
    assert len(lines) == 1, output
    return lines[0]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.peak_lrr=1", "did you mean optim.peak_lr?"),
        ("batch.seq_len=abc", "expected a whole number, got text 'abc'"),
        ("layout.pp=3", "dualpipe needs an even pp, got pp 3; nearest: 2"),
    ],
)
def test_a_wrong_setting_is_told_before_any_process_starts(tmp_path: Path, override: str, says: str) -> None:
    code, output = run("train", str(write_config(tmp_path, batch__global_batch_size=48)), override)
    assert code == 2 and says in output and "Traceback" not in output, output


def test_missing_data_names_the_folder_and_the_remedy(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    line = _refused("train", str(config), "data.source=null", f"data.path={tmp_path}/none")
    assert f"{tmp_path}/none" in line and "prepare" in line


def test_a_truncated_shard_is_refused_with_both_sizes(copy: Path) -> None:
    config = write_config(copy)
    shard = next((copy / "data").glob("train*.bin"))
    size = shard.stat().st_size
    os.truncate(shard, size - 10)
    line = _refused("train", str(config), "data.source=null")
    assert shard.name in line and str(size) in line and str(size - 10) in line


def test_a_checkpoint_of_another_model_is_refused_by_key(copy: Path) -> None:
    line = _refused("train", str(write_config(copy)), "model.ffn_size=96", "data.source=null")
    assert "ffn_size" in line and "96" in line and "64" in line


def test_a_corrupted_checkpoint_falls_back_to_the_previous_one_and_says_so(copy: Path) -> None:
    newest = copy / "runs/small/checkpoints/step_00000004"
    victim = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    code, output = run("train", str(write_config(copy)), "train.total_steps=5", "data.source=null")
    assert code == 0, output
    assert victim.name in output and "resuming after step 2" in output
    assert steps_done(copy / "runs/small") == [1, 2, 3, 4, 5]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_costs_a_checkpoint_but_not_the_run(tmp_path: Path) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(disk)], capture_output=True
    )
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.decode().strip()}")
    try:
        code, output = run("train", str(write_config(tmp_path, train__total_steps=3)))
        assert code == 2 and "no checkpoint" in output and "full" in output, output
        assert "Traceback" not in output
        assert steps_done(disk / "small") == [1, 2, 3]
        assert not [path for path in (disk / "small/checkpoints").rglob("*") if path.is_file()]
        events = [json.loads(line) for line in (disk / "small/events.jsonl").read_text().splitlines()]
        assert "checkpoint_failed" in [event["kind"] for event in events]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
