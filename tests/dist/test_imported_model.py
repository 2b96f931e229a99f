"""Training goes on from an imported model, in any layout, with a fresh optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_runtime.open_run import open_run
from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.load import load_model
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.world import World
from moe_runtime.train.loop import train
from tests.cli.small_run import write_config
from tests.ranks import run_ranks
from tests.unit.hugging_face.models import BASE, YARN, make_model, save

MODEL = ModelConfig.model_validate(BASE | {"vocab_size": 264})
LAYOUTS: dict[str, dict[str, Any]] = {
    "experts over two ranks": {"dp": 2, "ep": 2},
    "one rank": {},
    "dualpipe with experts over two ranks": {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"},
    "1f1b": {"pp": 2, "schedule": "1f1b"},
}
# So little that no weight moves by a bit, though masters, moments and biases go through a whole step.
NOTHING = {"optim": {"peak_lr": 1e-30, "moments": "fp32"}, "recipe": {"warmup_steps": 1, "bias_gamma": 0.0}}


def one_rank(rank: int, world_size: int, config: str, overrides: tuple[str, ...]) -> None:
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    train(open_run(load_config(config, overrides), world, fresh=False))


def refused_rank(rank: int, world_size: int, config: str) -> None:
    with pytest.raises(CheckpointError, match=r"model\.ffn_size: expected 64, got 40; use that model"):
        one_rank(rank, world_size, config, ("name=other", "model.ffn_size=64"))


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an imported model `ours`."""
    folder = tmp_path_factory.mktemp("imported")
    export_model(save(make_model(MODEL), folder / "run"), folder / "hub", ExportOptions())
    import_model(folder / "hub", folder / "ours", ImportOptions())
    return folder


def config_of_run(imported: Path, layout: dict[str, Any], **sections: Any) -> Path:
    path = write_config(imported, layout=layout, **sections)
    fields = yaml.safe_load(path.read_text())
    fields["bases"], fields["model"] = [str(imported / "ours/model.yaml")], {}
    fields["batch"]["global_batch_size"] = 8
    steps = {"total_steps": 1, "eval_every": 0, "sample_tokens": 1, "ema_decay": None}
    fields["train"] |= {"init_from": str(imported / "ours"), **steps}
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(LAYOUTS)],
)
def test_a_step_of_nothing_leaves_the_imported_bits_alone(imported: Path, name: str) -> None:
    layout = LAYOUTS[name]
    config, run = config_of_run(imported, layout, **NOTHING), name.replace(" ", "-")
    run_ranks(one_rank, layout.get("pp", 1) * layout.get("dp", 1), str(config), (f"name={run}",))
    checkpoint = open_checkpoint(imported / "runs" / run)
    assert checkpoint.manifest.step == 1 and checkpoint.manifest.partitions
    wanted = dict(_weights(imported / "ours"))
    got = dict(_weights(imported / "runs" / run))
    assert got.keys() == wanted.keys()
    for parameter, tensor in got.items():
        assert torch.equal(tensor, wanted[parameter]), parameter


def _weights(path: Path) -> Any:
    checkpoint = open_checkpoint(path)
    return read_tensors(checkpoint, [name for name, _, _ in checkpoint.manifest.weights()])


@pytest.mark.slow
def test_a_run_that_has_begun_resumes_and_needs_the_imported_model_no_more(imported: Path) -> None:
    config = str(config_of_run(imported, {}))
    run_ranks(one_rank, 1, config, ("name=resumed",))
    run_ranks(one_rank, 1, config, ("name=resumed", "train.init_from=gone", "train.total_steps=2"))
    assert open_checkpoint(imported / "runs/resumed").manifest.step == 2
    after, before = (load_model(imported / name).embed.weight.detach() for name in ("runs/resumed", "ours"))
    moved = after - before
    assert 0 < float(moved.abs().max()) < 0.1


@pytest.mark.slow
def test_another_model_is_refused_but_a_longer_context_is_not(imported: Path) -> None:
    path = config_of_run(imported, {}, **NOTHING)
    run_ranks(refused_rank, 1, str(path))
    fields = yaml.safe_load(path.read_text())
    fields["model"] = {"yarn": YARN}
    path.write_text(yaml.safe_dump(fields))
    run_ranks(one_rank, 1, str(path), ("name=longer",))
    assert open_checkpoint(imported / "runs/longer").manifest.config["model"]["yarn"]["factor"] == 8.0
