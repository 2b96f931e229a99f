"""A study from its file to its table, through real training: interrupted, taken up, not repeated."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.cli.small_run import ROOT, write_config

PROGRAM = [sys.executable, "-m", "moe_runtime", "ablate"]


def _write_study(folder: Path) -> Path:
    base = write_config(folder, layout__pp=1, layout__schedule="single", optim__moments="fp32")
    study = {
        "name": "small",
        "question": "is it so?",
        "base": str(base),
        "seeds": [1],
        "arms": {
            "bias": [],
            "mtp": ["model.mtp_depth=2", "model.num_groups=1", "model.num_groups_kept=1"],
            "broken": ["train.init_from=nowhere"],
        },
        "against": "bias",
        "columns": ["val_loss", "violation", "dead_experts", "accepted_sampled", "cache_bytes", "flops"],
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(study))
    return file


def _start(file: Path, *options: str) -> subprocess.Popen:
    folder = file.parent
    paths = ["--out", str(folder / "out"), "--results", str(folder / "results.jsonl")]
    return subprocess.Popen(
        [*PROGRAM, str(file), *paths, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def _lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_a_study_is_interrupted_taken_up_and_shown(tmp_path):
    file = _write_study(tmp_path)
    first = _start(file, "--arm", "bias")
    while not list(tmp_path.glob("out/*/metrics.jsonl")):
        assert first.poll() is None, first.communicate()
        time.sleep(0.1)
    os.kill(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    assert first.returncode == 130 and not _lines(tmp_path / "results.jsonl")

    second = _start(file)
    _, error = second.communicate(timeout=120)
    assert second.returncode == 1
    # The arm that cannot run is named, and the others are kept.
    assert "arm broken, seed 1: ended with code 2; see" in error and "Traceback" not in error
    results = _lines(tmp_path / "results.jsonl")
    assert len(results) == 2 and {result["steps"] for result in results} == {8}
    by_depth = {result["config"]["model"].get("mtp_depth", 1): result["measures"] for result in results}
    assert 0 <= by_depth[2]["second_sampled"] <= by_depth[2]["accepted_sampled"] <= 100
    assert by_depth[1]["nodes_reached"] <= 2  # of 4 groups that a token may use

    third = _start(file, "--show")
    shown, _ = third.communicate(timeout=60)
    assert "mtp - bias" in shown and "2 runs, seeds 1" in shown and "1 runs are missing" in shown
