"""Checkpoints of every released format are read, whole; `tests/dist/test_resharding.py` loads them."""

import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.checkpoint.consolidate import consolidate
from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.formats import FORMAT
from moe_runtime.checkpoint.load import config_of
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.optim.schedule import lr_at
from tests.dist.golden_checkpoint import STEPS
from tests.dist.layout_case import SEQ_LEN
from tests.dist.resume_case import Live, as_array, digests

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
