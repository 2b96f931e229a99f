"""Derived counts: the published ones, and those of the real modules, without a weight allocated."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from moe_runtime.config.counts import count_parameters
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.transformer import Transformer
from tests.unit.config.samples import ROOT, build


def _model(name: str) -> ModelConfig:
    return load_config(name).model


def test_the_published_widths_give_the_published_numbers() -> None:
    counts = count_parameters(_model("v3_671b"))
    assert f"{counts.total / 1e9:.2f}" == "671.03"
    assert round(counts.active / 1e9) == 37
    assert round(counts.active_with_embedding / 1e9, 1) == 37.6
    assert round(counts.mtp / 1e9, 1) == 11.6
    assert sum(counts.parts.values()) == counts.total


def test_the_sizes_by_name_have_the_size_of_their_name() -> None:
    assert round(count_parameters(_model("v3_16b")).total / 1e9, 1) == 15.7
    assert round(count_parameters(_model("v3_16b")).active / 1e9, 1) == 2.5
    assert 90e6 < count_parameters(_model("small")).active < 110e6
    assert 0.5e6 < count_parameters(_model("quickstart")).active < 1.5e6


@pytest.mark.parametrize("name", ["quickstart", "small", "v3_16b", "v3_671b"])
def test_counts_are_those_of_the_modules(name: str) -> None:
    config = _model(name)
    with torch.device("meta"):
        model = Transformer(config, device="meta")
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    assert all(parameter.is_meta for parameter in model.parameters())
    mtp = sum(size for key, size in sizes.items() if key.startswith("mtp."))
    counts = count_parameters(config)
    assert sum(sizes.values()) - mtp == counts.total
    assert mtp == counts.mtp
    experts = sum(size for key, size in sizes.items() if key.startswith("layers.") and ".experts." in key)
    assert experts == counts.parts["routed_experts"]
    idle = experts - experts * config.top_k // config.num_experts
    assert counts.active == counts.total - idle - sizes["embed.weight"]


@pytest.mark.parametrize("attention", [{}, {"q_lora_rank": 12}, {"attention": "mha"}])
@pytest.mark.parametrize("mtp_depth", [0, 2])
@pytest.mark.parametrize("num_dense_layers", [0, 4])
@pytest.mark.parametrize("num_shared_experts", [0, 2])
def test_counts_follow_every_option(
    attention: dict[str, Any], mtp_depth: int, num_dense_layers: int, num_shared_experts: int
) -> None:
    config = build(
        model={
            **attention,
            "mtp_depth": mtp_depth,
            "num_dense_layers": num_dense_layers,
            "num_shared_experts": num_shared_experts,
        }
    ).model
    counts = count_parameters(config)
    modules = Transformer(config, device="meta")
    assert sum(parameter.numel() for parameter in modules.parameters()) == counts.total + counts.mtp


def test_671_billion_weights_are_counted_without_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from moe_runtime.config.load import load_config; "
    code += "from moe_runtime.config.counts import count_parameters; "
    code += "print(count_parameters(load_config('v3_671b').model).total)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "671026404352"
