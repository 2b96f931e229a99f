"""Alerts judged again from a run folder: the same as in the run, or under other thresholds."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.config.load import dump_config, load_config
from moe_runtime.errors import ConfigError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(dump_config(load_config("configs/run/quickstart.yaml")))
    lines = [
        {"step": step, "tokens": step, "loss": 2.0, "spike_z": 1.0, "nonfinite": 0} for step in range(1, 31)
    ]
    lines[19] |= {"spike_z": 9.0}
    lines[24] |= {"loss": None, "nonfinite": 2}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3')
    return tmp_path


def replay(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["metrics", "alerts", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_run_is_judged_by_its_own_rules_and_by_others(run_dir: Path) -> None:
    first, over, last = replay(str(run_dir)).splitlines()
    assert first.startswith("step 25: alert nonfinite: nonfinite: expected at most 0, got 2;")
    assert over == "step 26: alert nonfinite is over" and last == "1 alert in 30 steps, by 9 rules"
    assert "step 20: alert spike" in replay(str(run_dir), "alerts.spike.threshold=8")
    custom = "alerts.custom=[{name: lost, metric: loss, above: 100}]"
    said = replay(str(run_dir), custom, "--json").splitlines()
    lost = {event["alert"]: event for event in map(json.loads, said)}["lost"]
    assert lost["step"] == 25 and lost["value"] is None and len(lost["last"]) == 20


def test_a_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a run folder with metrics.jsonl, got none"):
        CliRunner().invoke(app, ["metrics", "alerts", str(tmp_path)], catch_exceptions=False)
