"""Checkpoints of every released format are read, whole; `tests/dist/test_resharding.py` loads them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.checkpoint.consolidate import consolidate
from moe_runtime.checkpoint.folder import find_latest_good, open_checkpoint
from moe_runtime.checkpoint.formats import FORMAT, NewerFormatError
from moe_runtime.checkpoint.load import config_of
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.optim.schedule import lr_at
from tests.dist.golden_checkpoint import STEPS
from tests.dist.layout_case import SEQ_LEN
from tests.dist.resume_case import Live, as_array, digests
from tests.unit.checkpoint.samples import save

GOLDEN = Path(__file__).parents[2] / "golden" / "checkpoints"
RUNS = sorted(path.parent for path in GOLDEN.glob("format_*/*/state.json"))


def test_every_format_has_its_golden_checkpoints() -> None:
    assert {run.parent.name for run in RUNS} == {f"format_{number}" for number in range(1, FORMAT + 1)}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name} {run.name}")
def test_a_golden_checkpoint_holds_the_state_that_it_was_made_of(run: Path) -> None:
    checkpoint = open_checkpoint(run)
    names = [name for name, _, _ in checkpoint.manifest.weights()]
    found: Live = {("weight", name): as_array(tensor) for name, tensor in read_tensors(checkpoint, names)}
    for name, kinds in consolidate(checkpoint).items():
        found |= {(kind, name): values.numpy() for kind, values in kinds.items()}
    assert digests(found) == json.loads((run / "state.json").read_text())


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name} {run.name}")
def test_a_golden_checkpoint_says_where_its_run_was(run: Path) -> None:
    checkpoint = open_checkpoint(run)
    config, manifest = config_of(checkpoint), checkpoint.manifest
    position = manifest.position
    sequences = STEPS * config.batch.global_batch_size
    assert (position.step, position.sequences, position.tokens) == (STEPS, sequences, sequences * SEQ_LEN)
    assert position.skipped == ()
    if "lr" in manifest.schedules:  # from format 2 on
        expected = lr_at(config.recipe, config.optim.peak_lr, STEPS, position.tokens)
        np.testing.assert_allclose(manifest.schedules["lr"], expected)
        assert manifest.rng["seed"] == config.seed


def test_a_checkpoint_of_a_newer_version_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    for step in (10, 20):
        save(tmp_path, step)
    manifest = tmp_path / "checkpoints" / "step_00000020" / "manifest.json"
    body = manifest.read_bytes().split(b"\n", 1)[1].replace(b'"format": 2', b'"format": 3', 1)
    manifest.write_bytes(b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body)
    said = "step_00000020: manifest.json: format 3: written by a newer version; this one reads formats 1 to 2"
    with pytest.raises(NewerFormatError, match=said):
        find_latest_good(tmp_path / "checkpoints")
    with pytest.raises(NewerFormatError, match=said):
        open_checkpoint(tmp_path)
