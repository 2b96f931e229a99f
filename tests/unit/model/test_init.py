"""How parameters begin: by their names, whatever the slice, dtype or layout."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import small_config


def state(config: ModelConfig, seed: int = 3, **settings: Any) -> dict[str, Tensor]:
    model = Transformer(config, **settings)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(math.nan)  # whatever is not filled shows
    model.init_weights(seed)
    return model.state_dict()


def attention_names(config: ModelConfig) -> list[str]:
    if config.attention == "mha":
        return ["q.weight", "k.weight", "v.weight", "o.weight"]
    query = ["q.weight"] if config.q_lora_rank is None else ["q_a.weight", "q_a_norm.weight", "q_b.weight"]
    return [*query, "kv_a.weight", "kv_a_norm.weight", "kv_b.weight", "o.weight"]


def block_names(prefix: str, moe: bool, config: ModelConfig) -> set[str]:
    attention = [f"attn.{name}" for name in attention_names(config)]
    routed = ["router.weight", "router.bias", "experts.gate_up", "experts.down"]
    shared = ["shared.gate_up.weight", "shared.down.weight"]
    ffn = [f"moe.{n}" for n in (*routed, *shared)] if moe else ["ffn.gate_up.weight", "ffn.down.weight"]
    return {f"{prefix}.{name}" for name in ("attn_norm.weight", "ffn_norm.weight", *attention, *ffn)}


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"attention": "mha"}])
def test_state_dict_names_are_the_canonical_ones(changes: dict[str, Any]) -> None:
    config = small_config(**changes)
    wanted = {"embed.weight", "norm.weight", "head.weight"}
    for layer in range(3):
        wanted |= block_names(f"layers.{layer}", layer > 0, config)
    for depth in range(2):
        wanted |= {f"mtp.{depth}.{n}.weight" for n in ("enorm", "hnorm", "eh_proj", "norm")}
        wanted |= block_names(f"mtp.{depth}.block", True, config)
    assert set(state(config)) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_dtypes_begin_at_the_fp32_values_and_biases_stay_fp32(dtype: torch.dtype) -> None:
    config = small_config()
    wanted = state(config)
    for name, tensor in state(config, dtype=dtype).items():
        assert tensor.dtype == (torch.float32 if name.endswith("router.bias") else dtype)
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name


@pytest.mark.parametrize(
    "slice_of",
    [
        {"layers": range(2), "has_head": False},
        {"layers": range(1, 2), "has_embedding": False, "has_head": False},
        {"layers": range(2, 3), "has_embedding": False},
        {"layers": range(0), "has_embedding": False},
        {"num_local_experts": 2, "first_expert": 4},
        {"layers": range(2, 3), "num_local_experts": 4, "first_expert": 4, "has_embedding": False},
    ],
)
def test_every_slice_holds_the_values_of_the_whole(slice_of: dict[str, Any]) -> None:
    config = small_config()
    whole, part = state(config), state(config, **slice_of)
    first = slice_of.get("first_expert", 0)
    own = slice(first, first + slice_of.get("num_local_experts", config.num_experts))
    for name, tensor in part.items():
        assert torch.equal(tensor, whole[name][own] if ".experts." in name else whole[name]), name


def test_a_slice_holds_what_it_needs_and_no_more() -> None:
    config = small_config()
    whole = set(state(config))
    cuts = (range(1), range(1, 2), range(2, 3))
    parts = [
        set(state(config, layers=cut, has_embedding=n == 0, has_head=n == 2)) for n, cut in enumerate(cuts)
    ]
    assert set().union(*parts) == whole
    assert parts[0] & parts[2] == {"embed.weight"}, "MTP embeds tokens on the last stage too"
    assert not parts[1] & (parts[0] | parts[2])
    last = state(small_config(mtp_depth=0), layers=range(2, 3), has_embedding=False)
    assert "embed.weight" not in last


def test_matrices_are_normal_with_the_configured_deviation_norms_one_and_biases_zero() -> None:
    config = small_config(vocab_size=800, hidden_size=96, init_std=0.006)
    for name, tensor in state(config).items():
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        elif name.endswith("router.bias"):
            assert not tensor.any(), name
        else:
            count = tensor.numel()
            assert tensor.std().item() == pytest.approx(0.006, rel=5 / math.sqrt(2 * count)), name
            assert abs(tensor.mean().item()) < 5 * 0.006 / math.sqrt(count), name


def test_no_two_tensors_experts_or_seeds_share_their_values() -> None:
    config = small_config()
    firsts: set[float] = set()
    count = 0
    for seed in (0, 1):
        for name, tensor in state(config, seed).items():
            if not name.endswith(("norm.weight", "router.bias")):
                parts = list(tensor) if ".experts." in name else [tensor]
                firsts |= {part.flatten()[0].item() for part in parts}
                count += len(parts)
    assert len(firsts) == count


def test_the_same_seed_gives_the_same_values_whatever_was_drawn_before() -> None:
    config = small_config()
    first = state(config)
    torch.rand(17)
    assert all(torch.equal(tensor, first[name]) for name, tensor in state(config).items())
