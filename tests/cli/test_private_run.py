"""A run needs no network beyond the loopback, and keeps no secret in its folder."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.small_run import ROOT, write_config

_PLANTED = {"WANDB_API_KEY": "planted-wandb-5521", "HF_TOKEN": "planted-hugging-7733"}
_CAN_CUT_OFF = os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "unshare"))


@pytest.mark.skipif(not _CAN_CUT_OFF, reason="needs root, ip and unshare to take the network away")
def test_a_run_without_network_ends_well_and_its_folder_holds_no_secret(tmp_path: Path) -> None:
    config = write_config(tmp_path, train__total_steps=2, metrics={"wandb": "offline"})
    launch = [sys.executable, "-m", "moe_runtime.cli.launch", "train", str(config)]
    cut_off = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | _PLANTED
    done = subprocess.run(
        [*cut_off, *launch], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    run_dir = tmp_path / "runs" / "small"
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    holders = [
        path
        for path in written
        for value in (*_PLANTED.values(), "train " + str(config))
        if value.encode() in path.read_bytes()
    ]
    assert not holders
    assert stat.S_IMODE(run_dir.stat().st_mode) == 0o700
