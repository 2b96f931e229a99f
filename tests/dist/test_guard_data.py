"""A token that the model has no row for, found by one rank in the middle of a run. All ranks decide alike."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.config.load import load_config
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.prepare import ensure_prepared
from moe_runtime.data.shards import TokenDataset
from tests.dist.guard_world import Outcome, Trial, digests, events, records, try_all, write

STEP = 3
SEQUENCE = 21  # of the eight that step 3 reads, 16 to 23, one of the second lane


def spoil_sequence(config: str, copy: Path) -> str:
    """Copy the data, and put an id into a sequence that is too large; gives file and byte of it."""
    run = load_config(config, ())
    ensure_prepared(run.data, run.seed)
    shutil.copytree(run.data.path, copy)
    loader = BatchLoader(TokenDataset.open(copy), run.batch.seq_len, run.model.mtp_depth, run.seed, 264)
    where = loader.dataset.locate(int(loader.starts(np.array([SEQUENCE]))[0]))
    file, _, byte = where.rpartition(", byte ")
    ids = np.fromfile(file, "<u2")
    ids[int(byte) // 2] = 50_000
    ids.tofile(file)
    manifest = json.loads((copy / "manifest.json").read_text())
    (shard,) = manifest["splits"]["train"]["shards"]
    shard["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return where


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("data")
    config = write(folder, {"dp": 2}, train__total_steps=4)
    where = spoil_sequence(config, folder / "bad")
    bad = (f"data.path={folder / 'bad'}", "data.source=null")
    trials = (
        Trial("stop", bad),
        Trial("skip", (*bad, "data.bad=skip")),
        Trial("left_out", (f"train.skip_updates=[{STEP}]",)),
    )
    return config, where, try_all(2, config, trials)


def test_a_bad_id_ends_the_run_on_all_ranks_with_file_and_byte(runs: tuple) -> None:
    config, where, outcomes = runs
    (error,) = {outcome.error for outcome in outcomes["stop"]}
    assert error is not None and error.startswith(f"rank 1: {where}: token id 50000 is not below 264")
    assert [record["step"] for record in records(config, "stop")] == [1, 2, 3]


def test_or_costs_its_step_alone(runs: tuple) -> None:
    config, where, outcomes = runs
    assert [outcome.error for outcome in outcomes["skip"]] == [None, None]
    (event,) = events(config, "skip", "skipped")
    (blame,) = event["culprits"]
    assert event["step"] == STEP and blame["rank"] == 1 and blame["data"].startswith(where)
    assert digests(config, "skip") == digests(config, "left_out")
