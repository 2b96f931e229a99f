"""Runs of `benchmarks/fp8_loss.py` that part after a warm start have all in common up to there."""

import json
from pathlib import Path

import pytest

from benchmarks.fp8_loss import Run, Setting, perturb
from moe_runtime.data.prepare import prepare
from moe_runtime.data.task import Request


def data_of(folder: Path) -> Path:
    """A little text as bytes."""
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} * {n} = {n * n}\n" * 40}) + "\n" for n in range(20)))
    prepare(Request(str(text), "byte", validation_fraction=0.25), folder / "data")
    return folder / "data"


@pytest.mark.slow
def test_a_run_that_goes_on_from_another_is_that_run(tmp_path: Path) -> None:
    data, setting = data_of(tmp_path), Setting(steps=1, batch=1, lr=1e-3, device="cpu", warm=2)
    before, after, fp8 = (Run(variant, 0, setting, data) for variant in ("bf16", "bf16", "fp8"))
    perturb(after.masters.masters)
    before.steps(0, 2)
    for run in (after, fp8):
        run.go_on_from(before)
    wanted = before.steps(2, 3)
    assert after.steps(2, 3) == wanted
    assert fp8.steps(2, 3) != wanted
    assert after.steps(3, 4) == before.steps(3, 4), "moments or router biases stayed behind, or are shared"
