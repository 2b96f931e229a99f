"""Every layout that `plan --search` offers does train: four processes, a step each, through the real run."""

import json
import math
from pathlib import Path

import pytest

from moe_runtime.open_run import open_run
from moe_runtime.config.load import dump_config, load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.parallel.world import read_world
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.reckon.layouts import Ranked, search_layouts
from moe_runtime.train.loop import train
from tests.cli.small_run import write_config
from tests.ranks import run_ranks

GPUS, AT_ONCE = 4, 12  # processes; layouts that one set of processes trains, each with groups of its own


def _train_all(rank: int, world_size: int, paths: list[str]) -> None:
    for path in paths:
        config = load_config(path)
        train(open_run(config, read_world(config.device), fresh=True))


def _toy(folder: Path) -> RunConfig:
    """Layers and sequences enough for every schedule on four ranks."""
    train_one = {"total_steps": 1, "eval_every": 0, "eval_sequences": 4, "checkpoint_every": 0}
    path = write_config(
        folder,
        model__num_layers=8,
        batch__global_batch_size=16,
        batch__seq_len=16,
        **{f"train__{key}": value for key, value in (train_one | {"sample_tokens": 1}).items()},
    )
    return load_config(path)


def _offered(config: RunConfig) -> list[Ranked]:
    """One of each layout and batch; recompute and moments go round among them."""
    found = search_layouts(config, load_cluster("h800"), GPUS)
    assert not found.too_large
    by_frame: dict[str, list[Ranked]] = {}
    for one in found.ranked:
        by_frame.setdefault(one.candidate.frame.keys, []).append(one)
    choices = sorted(by_frame.items())
    return [ranked[7 * place % len(ranked)] for place, (_, ranked) in enumerate(choices)]


def _run(folder: Path, offered: list[Ranked]) -> None:
    paths = []
    for place, one in enumerate(offered):
        path = folder / f"{place}.yaml"
        config = one.candidate.config.model_dump(mode="json") | {"name": f"layout{place}"}
        path.write_text(dump_config(RunConfig.model_validate(config)))
        paths.append(str(path))
    for first in range(0, len(paths), AT_ONCE):
        run_ranks(_train_all, GPUS, paths[first : first + AT_ONCE], timeout_s=600)
    for place, one in enumerate(offered):
        lines = (folder / "runs" / f"layout{place}" / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [step["step"] for step in steps] == [1], one.candidate.frame.keys
        assert math.isfinite(steps[0]["loss"]) and steps[0]["grad_norm"] > 0


@pytest.mark.slow
def test_layouts_of_four_kinds_train(tmp_path: Path) -> None:
    wanted = {("single", 1, 4), ("dualpipev", 1, 2), ("interleaved", 2, 2), ("zbv", 4, 1)}
    found = {}
    for one in _offered(_toy(tmp_path)):
        layout = one.candidate.frame.layout
        if (layout.schedule, layout.pp, layout.ep) in wanted:
            found[layout.schedule] = one
    assert len(found) == len(wanted)
    _run(tmp_path, list(found.values()))


@pytest.mark.slow
def test_every_layout_trains(tmp_path: Path) -> None:
    offered = _offered(_toy(tmp_path))
    assert len(offered) > 150
    _run(tmp_path, offered)
