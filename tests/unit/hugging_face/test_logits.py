"""Logits equal those of transformers' DeepSeek-V3, for what we export and for what we import."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.load import load_model
from moe_runtime.config.schema import ModelConfig
from tests.unit.hugging_face.models import BASE, YARN, difference, load_peer, make_model, random_tokens, save

transformers = pytest.importorskip("transformers")

# Changes to BASE: q_lora some, 1 dense layer of 3, 8 experts in 4 groups of which 2 are kept, 1 MTP layer.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "full queries": {"q_lora_rank": None},
    "no dense layer": {"num_dense_layers": 0},
    "two dense layers": {"num_dense_layers": 2, "num_layers": 4},
    "one group": {"num_groups": 1, "num_groups_kept": 1},
    "two groups, one kept": {"num_groups": 2, "num_groups_kept": 1},
    "eight groups, three kept": {"num_experts": 16, "num_groups": 8, "num_groups_kept": 3, "top_k": 4},
    "all groups kept": {"num_groups_kept": 4, "top_k": 6},
    "YaRN": {"yarn": YARN},
    "YaRN, full queries": {"yarn": YARN | {"mscale": 0.7}, "q_lora_rank": None},
    "YaRN without mscale": {"yarn": YARN | {"mscale": 0.0}},
    "two shared experts": {"num_shared_experts": 2, "mtp_depth": 2},
    "no shared expert": {"num_shared_experts": 0, "mtp_depth": 0},
    "other theta and scale": {"rope_theta": 500.0, "routed_scaling_factor": 1.3, "mtp_depth": 0},
}
# The bound; what FP32 leaves of it is about a hundredth.
BOUND = 1e-4
TOKENS = 48  # three times YaRN's original context


def model_of(case: str) -> ModelConfig:
    return ModelConfig.model_validate(BASE | CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_has_our_logits_in_transformers(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    made = make_model(model)
    export_model(save(made, tmp_path / "run"), tmp_path / "hub", ExportOptions())
    peer = load_peer(tmp_path / "hub", model.num_layers)
    tokens = random_tokens(model, 2, TOKENS)
    with torch.no_grad():
        assert difference(made(tokens), peer(tokens).logits) <= BOUND


@pytest.mark.parametrize("case", CASES)
def test_what_save_pretrained_writes_is_imported_with_its_logits(case: str, tmp_path: Path) -> None:
    model = model_of(case)
    export_model(save(make_model(model), tmp_path / "run"), tmp_path / "hub", ExportOptions())
    peer = load_peer(tmp_path / "hub", model.num_layers)
    peer.config.num_mtp_layers = 1  # as save_pretrained declares, with no weights for it
    peer.save_pretrained(tmp_path / "theirs")
    found = import_model(tmp_path / "theirs", tmp_path / "ours", ImportOptions())
    assert found.model.mtp_depth == 0 and len(found.warnings) == 1
    tokens = random_tokens(model, 2, TOKENS)
    with torch.no_grad():
        assert difference(load_model(tmp_path / "ours")(tokens), peer(tokens).logits) <= BOUND
