"""A model whose context was extended has its logits in transformers at all positions, and says its length."""

import json
from pathlib import Path

import pytest
import torch

from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import ModelConfig
from tests.arch.sources import ROOT
from tests.unit.hugging_face.models import BASE, difference, load_peer, make_model, random_tokens, save

transformers = pytest.importorskip("transformers")

BOUND = 1e-4  # as in test_logits.py
LONG = 512


def test_an_extended_model_has_our_logits_in_transformers_at_512_positions(tmp_path: Path) -> None:
    yarn = load_config(ROOT / "configs/run/extension/phase2.yaml").model.yarn
    assert yarn is not None
    model = ModelConfig.model_validate(BASE | {"yarn": yarn.model_dump()})
    made = make_model(model)
    export_model(save(made, tmp_path / "run"), tmp_path / "hub", ExportOptions())
    peer = load_peer(tmp_path / "hub", model.num_layers)
    tokens = random_tokens(model, 1, LONG)
    with torch.no_grad():
        ours, theirs = made(tokens), peer(tokens).logits
    assert difference(ours, theirs) <= BOUND
    # Not because positions do not matter: without YaRN the same weights say something else far out.
    plain = make_model(ModelConfig.model_validate(BASE))
    with torch.no_grad():
        assert difference(plain(tokens)[:, 128:], theirs[:, 128:]) > 100 * BOUND
    said = json.loads((tmp_path / "hub/config.json").read_text())
    assert said["max_position_embeddings"] == 640 and said["rope_scaling"]["factor"] == 5.0
    found = import_model(tmp_path / "hub", tmp_path / "ours", ImportOptions())
    assert found.model.yarn == yarn
