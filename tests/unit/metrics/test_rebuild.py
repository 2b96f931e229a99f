"""`metrics sync`: what it makes of a run folder has the digits of metrics.jsonl, whatever befell it."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.errors import ConfigError
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.panel import ALERTS, HEATMAP, SAMPLES, TIMELINE, flat_values
from moe_runtime.metrics.spacing import Spacing
from moe_runtime.metrics.tensorboard_copy import tag_of
from moe_runtime.train.run_lock import lock_run
from tests.unit.metrics.told_run import HOSTILE, STEPS
from tests.wandb_file import only_file, read_wandb

MEDIA = {SAMPLES, ALERTS, HEATMAP, TIMELINE}


@pytest.fixture
def folder(told: Path, tmp_path: Path, no_wandb_account: None) -> Path:
    """A copy of the run that a test may damage, without its W&B files."""
    return Path(shutil.copytree(told, tmp_path / "run", ignore=shutil.ignore_patterns("wandb")))


def sync(*arguments: object) -> str:
    result = CliRunner().invoke(
        app, ["metrics", "sync", *(str(each) for each in arguments)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    return result.stdout


def numbers(path: Path) -> dict[int, dict]:
    """Of each step of a W&B file; media and W&B's own keys left out."""
    return {
        row["_step"]: {key: row[key] for key in row if key not in MEDIA and not key.startswith("_")}
        for row in read_wandb(path).history
    }


def test_a_rebuilt_wandb_run_is_what_was_recorded_beside_the_training(told: Path, folder: Path) -> None:
    said = sync(folder)
    assert said.startswith(f"{STEPS} steps in ") and "wandb sync" in said
    rebuilt, original = read_wandb(only_file(folder)), read_wandb(only_file(told))
    written = {line["step"]: flat_values(line) for line in read_jsonl(folder / "metrics.jsonl")}
    assert numbers(only_file(folder)) == numbers(only_file(told)) == written
    assert rebuilt.config == original.config and rebuilt.alerts == original.alerts
    for key in MEDIA:
        made = [(row["_step"], row[key].get("sha256")) for row in rebuilt.history if key in row]
        assert made == [(row["_step"], row[key].get("sha256")) for row in original.history if key in row]
        assert made, key
    kept = (folder / "wandb" / "run_id").read_text().strip()
    assert only_file(folder).stem == f"run-{kept}", "a resumed training goes on under it"


def test_a_run_that_is_under_way_keeps_its_own_id(folder: Path) -> None:
    (folder / "wandb").mkdir()
    (folder / "wandb" / "run_id").write_text("0badcafe\n")
    lock = lock_run(folder)
    try:
        sync(folder)
    finally:
        if lock is not None:
            lock.close()
    assert (folder / "wandb" / "run_id").read_text() == "0badcafe\n"
    assert only_file(folder).stem != "run-0badcafe"


def test_a_line_whose_step_is_no_number_is_left_out_and_told(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": "x", "loss": 1.0}\n{"loss": 1.0}\n')
    load = (folder / "expert_load.jsonl").read_text().splitlines()[-1]
    with (folder / "expert_load.jsonl").open("a") as file:
        file.write(json.dumps(json.loads(load) | {"step": "x"}) + "\n")
    result = CliRunner().invoke(app, ["metrics", "sync", str(folder), "--to", "tensorboard"])
    assert result.exit_code == 0 and result.stdout.startswith(f"{STEPS} steps"), result.output
    assert "metrics.jsonl: lines whose step is no whole number were left out: 2" in result.stderr


def test_torn_lines_and_missing_files_cost_what_they_held_and_no_more(folder: Path) -> None:
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 13, "loss": 0.')
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "sam')
    (folder / "expert_load.jsonl").unlink()
    (folder / "trace.json").write_text("{")
    assert sync(folder).startswith(f"{STEPS} steps")
    found = read_wandb(only_file(folder))
    assert {SAMPLES, ALERTS} <= found.keys and not {HEATMAP, TIMELINE} & found.keys


def test_tensorboard_has_the_digits_too_and_is_replaced_when_made_again(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    for _ in range(2):
        assert f"{STEPS} steps in" in sync(folder, "--to", "tensorboard")
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "images": 0})
    found.Reload()
    written = {line["step"]: flat_values(line) for line in read_jsonl(folder / "metrics.jsonl")}
    for key in {key for fields in written.values() for key in fields} - {"worst_layer"}:
        read = {event.step: float(make_ndarray(event.tensor_proto)) for event in found.Tensors(tag_of(key))}
        assert read == {step: fields[key] for step, fields in written.items() if key in fields}, key
    assert tag_of("loss") == "Learning/loss"
    assert [event.step for event in found.Images("Routing/expert_load")] == [2, 4, 6, 8, 10, 12]
    samples = found.Tensors(f"{SAMPLES}/text_summary")
    said = bytes(make_ndarray(samples[0].tensor_proto).flat[0]).decode()
    assert samples[0].step == 5 and [line[4:] for line in said.splitlines()] == f"{HOSTILE} 5".splitlines()
    assert not (folder / "tensorboard.new").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--to", "tensorboard", "--online"), "--online: is for W&B, got --to tensorboard; leave it out"),
        (("--to", "tensorboard", "--project", "p"), "--project: is for W&B"),
        (
            ("--online",),
            "no API key: set WANDB_API_KEY or run `wandb login`; without --online it is made here",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(folder: Path, options: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError) as refused:
        sync(folder, *options)
    assert says in str(refused.value)
    assert not list(folder.glob("wandb/offline-run-*")) and not (folder / "wandb" / "run_id").exists()


def test_a_folder_that_is_no_run_is_refused_with_the_file_that_it_lacks(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none/config\.yaml: cannot be read \(No such file"):
        sync(tmp_path / "none")
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: expected records of a run, got none"):
        sync(folder)
    (folder / "config.yaml").write_text("- a list")
    with pytest.raises(ConfigError, match="expected the YAML that moe-runtime writes there"):
        sync(folder)


def test_pictures_are_sparse_in_a_long_run_and_dense_at_its_beginning() -> None:
    spacing = Spacing()
    admitted = [step for step in range(10, 1_000_001, 10) if spacing.admits(step)]
    assert admitted[:6] == [10, 20, 30, 40, 50, 60] and len(admitted) < 300
    assert max(later / step for step, later in pairwise(admitted[80:])) < 1.06
