"""Every config in the repository loads, fits its own layout, and survives a round trip."""

from pathlib import Path

import pytest
import yaml

from moe_runtime.config.derive import total_steps
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import dump_config, load_config
from tests.arch.sources import ROOT

_RUNS = sorted(
    file
    for file in (ROOT / "configs" / "run").rglob("*.yaml")
    # A table of arms, of which each is a run, is not one itself.
    if "arms" not in yaml.safe_load(file.read_text())
)
_MODELS = sorted((ROOT / "configs" / "model").glob("*.yaml"))


@pytest.mark.parametrize("file", _RUNS, ids=lambda file: file.stem)
def test_run_config_loads_and_its_layout_checks(file: Path) -> None:
    config = load_config(file)
    layout = check_layout(config)
    assert config.name == file.stem
    assert total_steps(config, layout) > 0
    assert [i for layers in layout.layers for i in layers] == list(range(config.model.num_layers))


@pytest.mark.parametrize("file", _RUNS, ids=lambda file: file.stem)
def test_dumped_run_config_loads_to_the_same(file: Path, tmp_path: Path) -> None:
    config = load_config(file)
    copy = tmp_path / "config.yaml"
    copy.write_text(dump_config(config))
    assert load_config(copy) == config


@pytest.mark.parametrize("file", _MODELS, ids=lambda file: file.stem)
def test_model_config_is_a_base_for_a_run(file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(
        f"bases: [model/{file.name}]\n"
        "batch: {seq_len: 16, global_batch_size: 1}\ndata: {path: data/x}\ntrain: {total_steps: 1}\n"
    )
    assert load_config(run).model.num_layers > 0


def test_all_sizes_of_the_ladder_are_there() -> None:
    assert {file.stem for file in _MODELS} >= {"tiny", "small", "medium", "v3_16b", "v3_671b"}
    assert {file.stem for file in _RUNS} >= {"quickstart", "small", "medium", "v3_16b", "v3_671b"}
