"""`checkpoint diff`: any two layouts, tensors by name and by how much, and an exit code for scripts."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from moe_runtime.checkpoint.folder import file_fault, open_checkpoint, sha256_of
from moe_runtime.checkpoint.manifest import Manifest
from moe_runtime.cli.app import app

GOLDEN = Path(__file__).parents[1] / "golden" / "checkpoints"
FILE = "optimizer-00000.safetensors"


def call(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["checkpoint", "diff", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.stdout


def test_the_same_run_in_two_formats_has_the_same_tensors() -> None:
    code, said = call(GOLDEN / "format_1" / "bf16", GOLDEN / "format_2" / "bf16")
    assert code == 0
    counts = [line for line in said.splitlines() if "tensors alike" in line]
    assert [line.split(":")[0] for line in counts] == ["weights", "ema", "master", "exp_avg", "exp_avg_sq"]
    assert all(line.endswith(", 0 differ") for line in counts)


def test_keys_and_tensors_that_differ_are_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(GOLDEN / "format_2" / "bf16", run)
    _change(run)
    code, said = call(GOLDEN / "format_2" / "bf16", run)
    assert code == 1
    assert "config.optim.peak_lr: 0.002 -> 0.25" in said
    assert "master: 57 tensors alike, 1 differ" in said and "exp_avg: 58 tensors alike, 0 differ" in said
    assert "master embed.weight: 1 of 512 elements, by up to 1" in said
    code, said = call(GOLDEN / "format_2" / "bf16", run, "--json")
    found = json.loads(said)
    assert code == 1 and [(each["kind"], each["name"]) for each in found["differing"]] == [
        ("master", "embed.weight")
    ]
    assert abs(found["differing"][0]["largest"] - 1.0) < 1e-6


def _change(run: Path) -> None:
    """Another learning rate in the config, and one master weight larger by one, under a right seal."""
    checkpoint = open_checkpoint(run)
    folder, manifest = checkpoint.path, checkpoint.manifest
    tensors = load_file(folder / FILE)
    part = next(part for part in manifest.partitions if part.file == FILE and part.group == "dense")
    assert manifest.layouts[part.layout][0].param == "embed.weight" and part.start == 0
    tensors["dense.master"][7] += 1
    save_file(tensors, folder / FILE)
    fields = json.loads(manifest.model_dump_json())
    fields["config"]["optim"]["peak_lr"] = 0.25
    size = (folder / FILE).stat().st_size
    fields["files"][FILE] |= {"sha256": sha256_of(folder / FILE), "bytes": size}
    changed = Manifest.model_validate_json(json.dumps(fields))
    (folder / "manifest.json").write_bytes(changed.to_bytes())
    assert file_fault(folder, FILE, changed.files[FILE]) is None
    assert torch.isfinite(tensors["dense.master"]).all()
