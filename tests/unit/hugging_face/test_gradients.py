"""Gradients of one training step equal those of transformers' model with the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.names import parameters_of
from moe_runtime.checkpoint.weights import is_expert_slice
from moe_runtime.config.schema import ModelConfig
from tests.unit.hugging_face.models import BASE, YARN, load_peer, make_model, random_tokens, save

pytest.importorskip("transformers")

CASES: dict[str, dict[str, Any]] = {
    "query latent and groups": {},
    "full queries and YaRN": {"q_lora_rank": None, "yarn": YARN, "num_dense_layers": 2},
}


def peer_gradients(peer: torch.nn.Module) -> dict[str, Tensor]:
    """By DeepSeek's names: the experts that transformers fuses in memory are taken apart."""
    found: dict[str, Tensor] = {}
    for name, param in peer.named_parameters():
        assert param.grad is not None, name
        owner, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, grad in enumerate(param.grad):
                gate, up = grad.chunk(2)
                found[f"{owner}.{expert}.gate_proj.weight"] = gate
                found[f"{owner}.{expert}.up_proj.weight"] = up
        elif last == "down_proj":
            found |= {f"{owner}.{expert}.down_proj.weight": grad for expert, grad in enumerate(param.grad)}
        else:
            found[name] = param.grad
    return found


def our_gradients(made: torch.nn.Module, model: ModelConfig) -> dict[str, Tensor]:
    """By DeepSeek's names, through the table that export and import use."""
    ours: dict[str, Tensor] = {}
    for name, param in made.named_parameters():
        assert param.grad is not None, name
        if is_expert_slice(name):
            owner, _, last = name.rpartition(".")
            ours |= {f"{owner}.{expert}.{last}": grad for expert, grad in enumerate(param.grad)}
        else:
            ours[name] = param.grad
    named = {each.name: each.parts for each in parameters_of(model)}
    found: dict[str, Tensor] = {}
    for name, grad in ours.items():
        found |= dict(zip(named[name], grad.chunk(len(named[name])), strict=True))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_that_of_transformers(case: str, tmp_path: Path) -> None:
    model = ModelConfig.model_validate(BASE | CASES[case] | {"mtp_depth": 0})
    made = make_model(model)
    export_model(save(made, tmp_path / "run"), tmp_path / "hub", ExportOptions())
    peer = load_peer(tmp_path / "hub", model.num_layers)
    tokens = random_tokens(model, 4, 49)
    ours = made.losses(tokens).loss
    ours.backward()
    targets = tokens[:, 1:].contiguous()
    theirs = peer(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    got, wanted = our_gradients(made, model), peer_gradients(peer)
    assert got.keys() == wanted.keys()
    far = {name: float((got[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted}
    assert max(far.values()) <= 1e-4, max(far.items(), key=lambda item: item[1])
