"""Weights of any slice of the model, to files and back, for any other slice."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_runtime.checkpoint.folder import open_checkpoint
from moe_runtime.checkpoint.load import load_model
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.checkpoint.weights import (
    check_same_model,
    load_weights,
    name_of_expert,
    split_experts,
    weights_to_save,
)
from moe_runtime.errors import CheckpointError
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.peers import Peers
from tests.unit.checkpoint.models import CONFIG, tiny_model


def save_model(run_dir: Path, model: Transformer, peers: Peers | None = None) -> None:
    weights = weights_to_save(model.state_dict(), 0, peers or Peers())
    meta = SaveMeta(tokens=0, config=CONFIG.model_dump(mode="json"), layout={"pp": 1})
    outcome = CheckpointStore(run_dir, Peers(), 2).save(1, Contribution(weights), meta)
    assert isinstance(outcome, Saved)


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_loaded_model_gives_bitwise_the_same_logits(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert same_bits(model.state_dict(), loaded.state_dict())
    tokens = torch.randint(0, CONFIG.model.vocab_size, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(tokens), loaded(tokens))


def test_every_expert_is_a_tensor_of_its_own_on_disk(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    save_model(tmp_path, model)
    names = [name for name, _, _ in open_checkpoint(tmp_path).manifest.weights()]
    assert "layers.1.moe.experts.3.gate_up" in names and "mtp.0.block.moe.experts.0.down" in names
    assert "layers.1.moe.router.bias" in names
    assert not [name for name in names if name.endswith("experts.gate_up")]


@pytest.mark.parametrize("layers", [range(1), range(1, 3), range(2, 2)])
@pytest.mark.parametrize(("first_expert", "num_experts"), [(0, 4), (0, 2), (2, 2), (3, 1)])
def test_any_slice_loads_its_part(tmp_path: Path, layers: range, first_expert: int, num_experts: int) -> None:
    whole = tiny_model(seed=1)
    save_model(tmp_path, whole)
    part = Transformer(
        CONFIG.model,
        layers=layers,
        has_embedding=layers.start == 0,
        has_head=layers.stop == 3,
        num_local_experts=num_experts,
        first_expert=first_expert,
    )
    load_weights(part, open_checkpoint(tmp_path), first_expert)
    expected = split_experts(whole.state_dict())
    for name, tensor in split_experts(part.state_dict(), first_expert).items():
        assert torch.equal(tensor, expected[name]), name


def test_weights_are_cast_to_the_dtype_asked_for(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    save_model(tmp_path, model)
    loaded = load_model(tmp_path, dtype=torch.float64)
    weight = loaded.state_dict()["layers.0.ffn.down.weight"]
    assert weight.dtype == torch.float64
    assert torch.equal(weight.float(), model.state_dict()["layers.0.ffn.down.weight"])


def test_a_missing_parameter_is_named_and_nothing_is_changed(tmp_path: Path) -> None:
    model = tiny_model(seed=1)
    weights = split_experts(model.state_dict())
    del weights["norm.weight"]
    meta = SaveMeta(tokens=0, config=CONFIG.model_dump(mode="json"), layout={})
    CheckpointStore(tmp_path, Peers(), 2).save(1, Contribution(weights), meta)
    target = tiny_model(seed=2)
    with pytest.raises(CheckpointError, match=r"expected parameter norm\.weight, got none"):
        load_weights(target, open_checkpoint(tmp_path))
    assert same_bits(target.state_dict(), tiny_model(seed=2).state_dict())


def test_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(seed=1))
    wide = Transformer(CONFIG.model.model_copy(update={"vocab_size": 50}))
    with pytest.raises(CheckpointError, match=r"embed\.weight: expected shape \[50, 16\], got \[40, 16\]"):
        load_weights(wide, open_checkpoint(tmp_path))


def test_a_checkpoint_of_another_model_is_refused_with_every_key_that_differs(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(seed=1))
    checkpoint = open_checkpoint(tmp_path)
    check_same_model(checkpoint, CONFIG.model)
    other = CONFIG.model.model_copy(update={"hidden_size": 32, "top_k": 1, "attention": "mha"})
    with pytest.raises(CheckpointError) as caught:
        check_same_model(checkpoint, other)
    told = "model.hidden_size: expected 32, got 16; model.top_k: expected 1, got 2"
    assert f"model.attention: expected mha, got mla; {told}" in str(caught.value)


def test_expert_names_carry_the_global_number() -> None:
    assert name_of_expert("mtp.0.block.moe.experts.down", 7) == "mtp.0.block.moe.experts.7.down"
    state = {"layers.3.moe.experts.gate_up": torch.zeros(2, 4, 3), "norm.weight": torch.ones(3)}
    assert list(split_experts(state, 6)) == [
        "layers.3.moe.experts.6.gate_up",
        "layers.3.moe.experts.7.gate_up",
        "norm.weight",
    ]
