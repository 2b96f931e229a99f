"""What stands in W&B's own file after a run: every digit, the pictures, and no secret."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moe_runtime.metrics.heatmap_picture import draw_heatmap
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.panel import ALERTS, HEATMAP, SAMPLES, TIMELINE, flat_values
from moe_runtime.metrics.record import metric_of
from moe_runtime.metrics.system import system_facts
from moe_runtime.metrics.table_events import read_table_events
from tests.unit.metrics.told_run import DEAD, HOSTILE, STEPS, TRACED, config, load, told_run
from tests.wandb_file import WandbFile, only_file, read_wandb

MEDIA = {SAMPLES, ALERTS, HEATMAP, TIMELINE}


@pytest.fixture(scope="module")
def file(told: Path) -> WandbFile:
    return read_wandb(only_file(told))


def rows(file: WandbFile) -> dict[int, dict]:
    """Numbers of each step; media and W&B's own keys left out."""
    return {
        row["_step"]: {key: row[key] for key in row if key not in MEDIA and not key.startswith("_")}
        for row in file.history
    }


def test_wandb_has_the_digits_of_metrics_jsonl(told: Path, file: WandbFile) -> None:
    written = {line["step"]: flat_values(line) for line in read_jsonl(told / "metrics.jsonl")}
    assert rows(file) == written and len(written) == STEPS
    assert "loss" not in written[5], "what is not finite is a gap"


def test_every_key_that_wandb_gets_is_documented(file: WandbFile) -> None:
    assert [key for key in file.keys - MEDIA if metric_of(key) is None] == []


def test_the_tables_of_samples_and_alerts_grow(told: Path, file: WandbFile) -> None:
    samples = [row[SAMPLES] for row in file.history if SAMPLES in row]
    assert [(table["nrows"], table["log_mode"]) for table in samples] == [
        (1, "INCREMENTAL"),
        (2, "INCREMENTAL"),
    ]
    media = only_file(told).parent / "files"
    read = [json.loads((media / table["path"]).read_text()) for table in samples]
    assert [table["data"] for table in read] == [[[5, f"{HOSTILE} 5"]], [[10, f"{HOSTILE} 10"]]]
    alerts = [row[ALERTS] for row in file.history if ALERTS in row]
    table = json.loads((media / alerts[-1]["path"]).read_text())
    assert table["columns"][:2] == ["step", "alert"] and alerts[-1]["nrows"] == 2
    assert file.alerts == [("dead_expert at step 8", "expert 2 is dead")], "told to people only if asked"


def test_the_heatmap_and_the_timeline_are_there(told: Path, file: WandbFile) -> None:
    media = only_file(told).parent / "files"
    pictures = {row["_step"]: row[HEATMAP] for row in file.history if HEATMAP in row}
    assert list(pictures) == [2, 4, 6, 8, 10, 12]
    table, run = load(config()).numpy(), config()
    layers = [f"layers.{n}" for n in range(run.model.num_dense_layers, run.model.num_layers)]
    expected = draw_heatmap([*layers, *(f"mtp.{n}.block" for n in range(run.model.mtp_depth))], table)
    assert np.array_equal(np.asarray(Image.open(media / pictures[2]["path"])), np.asarray(expected))
    (drawn,) = [row for row in file.history if TIMELINE in row]
    assert drawn["_step"] == TRACED and (media / drawn[TIMELINE]["path"]).read_text().startswith("<svg")


def test_a_dead_expert_is_a_black_column_and_no_other_is() -> None:
    table = load(config()).numpy()
    columns = np.asarray(draw_heatmap(["layers.0"] * len(table), table))
    black = (columns == 0).all(axis=2)
    # A column of cells is as high as the rows; letters and the scale's box of dead experts are smaller.
    tall = np.flatnonzero(black.sum(axis=0) >= 14 * len(table))
    assert len(tall) == tall[-1] - tall[0] + 1, "one expert"
    place = (tall[0] - (8 + 6 * len("layers.0") + 6)) / len(tall)
    assert place == DEAD


def test_the_config_and_the_system_are_told_without_names_of_people_or_machines(file: WandbFile) -> None:
    shown = {key: value for key, value in file.config.items() if key not in ("_wandb", "system")}
    assert shown == json.loads(json.dumps(config().model_dump(mode="json")))
    facts = file.config["system"]
    assert facts == json.loads(json.dumps(system_facts()))
    assert {"python", "packages", "processor", "cores", "memory_gb", "gpus"} <= facts.keys()


def test_no_argument_and_no_variable_of_the_environment_reaches_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_wandb_account: None
) -> None:
    planted = {"PLANTED_TOKEN": "planted-7733", "HF_TOKEN": "planted-1199", "SOME_WORD": "planted-4242"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--secret=planted-5521"])
    run_dir = told_run(tmp_path / "run")
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {".wandb", ".jsonl", ".log", ".png", ".html"} <= {path.suffix for path in written}
    holders = [
        path for path in written for word in ("planted-", "--secret") if word.encode() in path.read_bytes()
    ]
    assert holders == []


def test_a_torn_file_is_read_up_to_the_tear(told: Path, tmp_path: Path) -> None:
    data = only_file(told).read_bytes()
    torn = tmp_path / "torn.wandb"
    torn.write_bytes(data[: int(len(data) * 0.8)])
    found = read_wandb(torn)
    assert len(found.history) > 0 and found.config["name"] == config().name


def test_of_samples_made_twice_the_newer_counts_and_later_ones_can_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [
        {"kind": "sample", "step": 4, "text": "lost"},
        {"kind": "sample", "step": 2, "text": "first"},
        {"kind": "resume"},
        {"kind": "sample", "step": 4, "text": "again"},
        {"kind": "sample", "step": 9, "text": "later"},
    ]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    found = read_table_events(path, last_step=4)
    assert [(event["step"], event["text"]) for event in found] == [(2, "first"), (4, "again")]
    assert len(read_table_events(path)) == 3
