"""What backward makes again is the same, and until then the memory is free."""

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import draw_tokens, small_config, small_model
from tests.unit.model.watch import Watch

PARTS = {
    "nothing": {},
    "norm": {"norm": True},
    "swiglu": {"swiglu": True},
    "mla_up": {"mla_up": True},
    "all": {"norm": True, "swiglu": True, "mla_up": True},
}


def open_case(
    part: str, q_lora_rank: int | None, dtype: torch.dtype = torch.float64, separator: int | None = None
) -> tuple[Transformer, Tensor]:
    """A dense and a MoE layer and one MTP depth, and tokens of two sequences of 16."""
    config = small_config(q_lora_rank=q_lora_rank, num_layers=2, mtp_depth=1)
    recompute = RecomputeConfig(**PARTS[part])
    model = small_model(config, recompute=recompute, dtype=dtype, document_separator=separator)
    return model, draw_tokens(config, 2, 16 + 2)


def gradients(
    part: str, q_lora_rank: int | None, dtype: torch.dtype, separator: int | None
) -> dict[str, Tensor]:
    model, tokens = open_case(part, q_lora_rank, dtype, separator)
    losses = model.losses(tokens)
    (losses.loss + 0.3 * losses.loss_mtp + 0.7 * losses.balance).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def held_bytes(part: str, q_lora_rank: int | None) -> int:
    """What lives between forward and backward."""
    model, tokens = open_case(part, q_lora_rank)
    with Watch() as watch:
        losses = model.losses(tokens)
    held = watch.living_bytes(model)
    assert losses.loss.requires_grad
    return held


@pytest.mark.parametrize(
    ("q_lora_rank", "dtype", "separator"),
    [
        (10, torch.float64, None),
        (None, torch.float64, 5),
        (None, torch.bfloat16, None),
        (10, torch.bfloat16, 5),
    ],
)
def test_gradients_are_the_same_bit_for_bit(
    q_lora_rank: int | None, dtype: torch.dtype, separator: int | None
) -> None:
    wanted = gradients("nothing", q_lora_rank, dtype, separator)
    for part in ("norm", "swiglu", "mla_up", "all"):
        got = gradients(part, q_lora_rank, dtype, separator)
        assert got.keys() == wanted.keys()
        for name, grad in got.items():
            assert torch.equal(grad, wanted[name]), f"{part}: {name}"


def test_norms_of_multi_head_attention_are_made_again_bit_for_bit() -> None:
    found = []
    for norm in (False, True):
        config = small_config(attention="mha", num_layers=2, mtp_depth=1)
        model = small_model(config, recompute=RecomputeConfig(norm=norm))
        losses = model.losses(draw_tokens(config, 2, 16 + 2))
        (losses.loss + losses.loss_mtp).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_each_part_saves_at_least_the_bytes_it_names(q_lora_rank: int | None) -> None:
    """Per token in FP64: of 3 blocks, 2 of them MoE."""
    config = small_config(q_lora_rank=q_lora_rank)
    tokens, held = 2 * 16, {part: held_bytes(part, q_lora_rank) for part in PARTS}
    saved = {part: (held["nothing"] - held[part]) / (8 * tokens) for part in PARTS}
    # The routed and the shared products; the dense product.
    routed_and_shared = (config.top_k + config.num_shared_experts) * config.expert_ffn_size
    assert saved["swiglu"] >= 2 * routed_and_shared + config.ffn_size
    # Queries, keys and values, these padded to the width of keys.
    assert saved["mla_up"] >= 3 * config.num_heads * 3 * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    # Both inputs of each block and its latents, and the two norms joined for eh_proj.
    latents = config.kv_lora_rank + (q_lora_rank or 0)
    assert saved["norm"] >= 3 * (2 * config.hidden_size + latents) + 2 * config.hidden_size
    assert held["all"] < min(held[part] for part in ("norm", "swiglu", "mla_up"))


@pytest.mark.parametrize("part", ["norm", "all"])
@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_a_norm_is_made_again_once_however_many_read_it(q_lora_rank: int | None, part: str) -> None:
    model, tokens = open_case(part, q_lora_rank)
    losses = model.losses(tokens)
    with Watch() as watch:
        (losses.loss + losses.loss_mtp + losses.balance).backward()
    latents = 2 if q_lora_rank else 1
    # Per block both inputs and the latents; shared experts run apart from the router and make their
    # input for themselves; enorm and hnorm. The norms before the head stay.
    assert watch.calls["aten.rsqrt_"] == 3 * (2 + latents) + 2 + 2


def test_a_shared_value_is_made_once_for_all_users_and_then_dropped() -> None:
    made: list[Tensor] = []

    def make() -> Tensor:
        assert not torch.is_grad_enabled()
        made.append(torch.ones(1))
        return made[-1]

    again = Recomputed(make, users=3)
    assert len({id(again.take()) for _ in range(3)}) == 1
    assert again.take() is made[1] and len(made) == 2


def test_without_gradients_recompute_changes_nothing() -> None:
    config = small_config()
    tokens = draw_tokens(config, 1, 9)
    with torch.no_grad():
        kept = small_model(config)(tokens)
        again = small_model(config, recompute=RecomputeConfig(**PARTS["all"]))(tokens)
    assert torch.equal(kept, again)
