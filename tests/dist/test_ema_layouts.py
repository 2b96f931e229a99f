"""The average of weights in real runs: the same in two layouts, in the checkpoint, and read by a model."""

from pathlib import Path

import pytest
import torch

from moe_runtime.open_run import open_run
from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.load import load_model
from moe_runtime.checkpoint.tensors import read_tensors
from moe_runtime.config.load import load_config
from moe_runtime.errors import CheckpointError
from moe_runtime.parallel.world import World
from moe_runtime.train.loop import train
from tests.cli.small_run import write_config
from tests.ranks import run_ranks

STEPS = 4


def short_run(rank: int, world_size: int, config: str, overrides: tuple[str, ...]) -> None:
    world = World(rank, world_size, rank, world_size, torch.device("cpu"))
    train(open_run(load_config(config, overrides), world, fresh=False))


def averages(run_dir: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(run_dir)
    names = [name for name, _, _ in checkpoint.manifest.weights("ema")]
    assert sorted(names) == sorted(name for name, _, _ in checkpoint.manifest.weights())
    return dict(read_tensors(checkpoint, names, "ema"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ema")
    config = str(write_config(folder, layout={}))
    common = (f"train.total_steps={STEPS}", "train.eval_every=0", "optim.moments=fp32", "train.ema_decay=0.75")
    run_ranks(short_run, 1, config, (*common, "name=one"))
    run_ranks(short_run, 2, config, (*common, "name=two", "layout.dp=2", "layout.ep=2"))
    run_ranks(short_run, 1, config, (*common, "name=zero", "train.ema_decay=0"))
    return folder / "runs"


def test_two_layouts_give_the_same_average(runs: Path) -> None:
    one, two = averages(runs / "one"), averages(runs / "two")
    weights = load_model(runs / "one").state_dict()
    assert one.keys() == two.keys()
    for name, average in one.items():
        assert average.dtype == torch.float32
        # AdamW's first steps are sign-like: where a gradient is nothing but rounding, they may differ by a step.
        assert (average - two[name]).abs().mean() < 1e-6, name
    moved = [name for name in one if name in weights and not torch.equal(one[name], weights[name])]
    assert len(moved) > len(weights) / 2


def test_without_decay_the_average_is_the_weights(runs: Path) -> None:
    checkpoint = open_checkpoint(runs / "zero")
    average = averages(runs / "zero")
    assert all(torch.equal(average[name], tensor) for name, tensor in read_tensors(checkpoint, average))


def test_a_model_is_loaded_from_the_average(runs: Path) -> None:
    model, average = load_model(runs / "one", ema=True), averages(runs / "one")
    assert torch.equal(model.state_dict()["head.weight"], average["head.weight"])
    assert torch.equal(
        model.state_dict()["layers.1.moe.experts.down"][3], average["layers.1.moe.experts.3.down"]
    )
    assert not torch.equal(model.state_dict()["head.weight"], load_model(runs / "one").state_dict()["head.weight"])


@pytest.mark.slow
def test_a_run_that_begins_to_average_begins_at_its_weights_and_one_without_says_so(runs: Path) -> None:
    config = str(runs.parent / "run.yaml")
    common = ("name=late", "train.eval_every=0", "layout={}", "train.sample_tokens=1")
    run_ranks(short_run, 1, config, (*common, "train.total_steps=2", "train.ema_decay=null"))
    with pytest.raises(CheckpointError, match=r"expected averaged weights, got none; train with train\.ema"):
        load_model(runs / "late", ema=True)
    before = load_model(runs / "late").state_dict()["head.weight"]
    run_ranks(short_run, 1, config, (*common, "train.total_steps=3", "train.ema_decay=0.5"))
    after = load_model(runs / "late").state_dict()["head.weight"]
    torch.testing.assert_close(averages(runs / "late")["head.weight"], (before + after) / 2)
