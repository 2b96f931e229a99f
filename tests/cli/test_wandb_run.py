"""Twenty steps of a real run with everything turned on: what W&B has of it, and where ranks have spoken."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moe_runtime.cli.app import app
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.panel import ALERTS, HEATMAP, PER_LAYER, SAMPLES, TIMELINE, flat_values
from moe_runtime.metrics.record import METRICS, metric_of
from moe_runtime.metrics.workspace import regex_of
from tests.cli.forked_run import train_under_faults
from tests.cli.small_run import write_config
from tests.wandb_file import WandbFile, only_file, read_wandb
from tests.workspace_keys import shown_keys

pytestmark = pytest.mark.slow
STEPS, RANKS = 20, 4
MEDIA = {SAMPLES, ALERTS, HEATMAP, TIMELINE}
PLANTED = {"PLANTED_TOKEN": "planted-7733", "HF_TOKEN": "planted-1199", "WANDB_API_KEY": "planted-5521"}

# Numbers that this run cannot have, and why; whoever adds one says so here.
ELSEWHERE = {"alloc_retries": "the allocator of a GPU counts them", "mttr_s": "nothing failed"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run: products and moments in FP8, experts over two nodes, two sets of text."""
    folder = tmp_path_factory.mktemp("wandb")
    text = f"dir:{folder / 'text'}"
    sets = {
        name: {"path": str(folder / name), "weight": weight, "source": text}
        for name, weight in (("first", 1.0), ("second", 3.0))
    }
    config = write_config(
        folder,
        precision="fp8",
        layout={"dp": 4, "ep": 4, "dispatcher": "two_hop", "ranks_per_node": 2},
        batch={"seq_len": 32, "global_batch_size": 8},
        data={"mixture": sets},
        guard={"spike_window": 8, "spike_z": 50.0, "digest_every": 5},
        metrics={
            "wandb": "offline",
            "heatmap_every": 5,
            "numerics_every": 5,
            "window": 10,
            "peak_tflops": 0.1,
        },
        train__total_steps=STEPS,
        train__eval_every=10,
        train__sample_every=10,
        train__checkpoint_every=5,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PLANTED.items():
            patch.setenv(name, value)
        ended = train_under_faults(config, folder / "ranks", RANKS)
    assert ended is None, (folder / "ranks" / "output").read_text()
    return folder / "runs" / "small"


@pytest.fixture(scope="module")
def file(run_dir: Path) -> WandbFile:
    return read_wandb(only_file(run_dir))


def test_everything_that_is_emitted_is_documented(run_dir: Path, file: WandbFile) -> None:
    assert [key for key in file.keys - MEDIA if metric_of(key) is None] == []
    written = {line["step"]: flat_values(line) for line in read_jsonl(run_dir / "metrics.jsonl")}
    rows = {
        row["_step"]: {key: row[key] for key in row if key not in MEDIA and not key.startswith("_")}
        for row in file.history
    }
    assert rows == written and list(written) == list(range(1, STEPS + 1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of wandb_workspaces itself
def test_every_key_of_the_workspace_is_emitted(file: WandbFile) -> None:
    made = CliRunner().invoke(app, ["dashboard", "--json", "-"], catch_exceptions=False)
    patterns, media = shown_keys(json.loads(made.stdout))
    missing = {pattern for pattern in patterns if not any(map(re.compile(pattern).search, file.keys))}
    assert missing == {regex_of([key]) for key in ELSEWHERE}
    assert media - file.keys == {ALERTS}, "a clean run raises none"


def test_no_secret_of_the_environment_is_in_a_file_of_the_run(run_dir: Path) -> None:
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    holders = [path for path in written for value in PLANTED.values() if value.encode() in path.read_bytes()]
    assert holders == []


def test_every_rank_but_the_first_has_a_log(run_dir: Path) -> None:
    logs = sorted((run_dir / "logs").iterdir())
    assert [path.name for path in logs] == [f"rank{rank}.log" for rank in range(1, RANKS)]
    assert all(
        re.match(rf"--- \S+ {path.stem[:4]} {path.stem[4:]}, attempt 1, process", path.read_text())
        for path in logs
    )


def test_the_number_of_keys_does_not_grow_with_the_model(file: WandbFile) -> None:
    unbounded = {path for path in METRICS if path.startswith(f"{PER_LAYER}/")}
    assert unbounded and not any(key.startswith(f"{PER_LAYER}/") for key in file.keys)
    assert len(file.keys) < 200
