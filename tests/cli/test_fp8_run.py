"""A run with FP8 products through the launcher: it says so, resumes to the same bits, is read in BF16."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moe_runtime.checkpoint.load import load_model
from moe_runtime.cli.app import app
from moe_runtime.model.linear import PlainMultiplier
from tests.cli.small_run import digests, run, steps_done, write_config

pytestmark = pytest.mark.launcher


@pytest.mark.slow
def test_an_fp8_run_resumes_to_the_same_bits_and_is_read_as_a_bf16_model(tmp_path: Path) -> None:
    config = write_config(
        tmp_path,
        precision="fp8",
        recompute={"norm": True, "mla_up": True},
        train__total_steps=4,
        train__checkpoint_every=2,
    )
    run_dir = tmp_path / "runs" / "small"
    code, output = run("train", str(config))
    assert code == 0, output
    assert "emulated on the CPU (reference)" in output
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert [event["kind"] for event in events].count("fp8") == 1
    whole = digests(run_dir, 4)

    shutil.rmtree(run_dir / "checkpoints" / "step_00000004")
    code, output = run("train", str(config))
    assert code == 0 and "resuming after step 2" in output, output
    assert steps_done(run_dir) == [1, 2, 3, 4]
    assert digests(run_dir, 4) == whole

    model = load_model(run_dir)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert isinstance(model.blocks()[0].attn.o.multiplier, PlainMultiplier)
    command = ["eval", str(run_dir), "--data", str(tmp_path / "data"), "--sequences", "8", "--json"]
    found = CliRunner().invoke(app, command)
    assert found.exit_code == 0, found.output
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    apart = abs(json.loads(found.stdout)["loss"] / records[-1]["val_loss"] - 1)
    assert apart < 0.01, "the loss in BF16 and in FP8"
