"""What backward makes again is the same, and until then the memory is free."""

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.model.recompute import Recomputed
from tests.unit.model.samples import draw_tokens, small_config, small_model
from tests.unit.model.watch import Watch

PARTS = {
    "nothing": {},
    "norm": {"norm": True},
    "swiglu": {"swiglu": True},
    "mla_up": {"mla_up": True},
    "all": {"norm": True, "swiglu": True, "mla_up": True},
}


def step(
    part: str, q_lora_rank: int | None, dtype: torch.dtype, separator: int | None = None
) -> tuple[int, dict[str, Tensor]]:
    """(bytes held between forward and backward, gradients)."""
    config = small_config(q_lora_rank=q_lora_rank)
    recompute = RecomputeConfig(**PARTS[part])
    model = small_model(config, recompute=recompute, dtype=dtype, document_separator=separator)
    tokens = draw_tokens(config, 2, 16 + 3)
    with Watch() as watch:
        losses = model.losses(tokens)
    held = watch.living_bytes(model)
    (losses.loss + 0.3 * losses.loss_mtp + 0.7 * losses.balance).backward()
    return held, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
@pytest.mark.parametrize("q_lora_rank", [10, None])
@pytest.mark.parametrize("separator", [None, 5], ids=["causal", "documents"])
def test_gradients_are_the_same_bit_for_bit(
    q_lora_rank: int | None, dtype: torch.dtype, separator: int | None
) -> None:
    _, wanted = step("nothing", q_lora_rank, dtype, separator)
    for part in ("norm", "swiglu", "mla_up", "all"):
        _, got = step(part, q_lora_rank, dtype, separator)
        assert got.keys() == wanted.keys()
        for name, grad in got.items():
            assert torch.equal(grad, wanted[name]), f"{part}: {name}"


@pytest.mark.parametrize("q_lora_rank", [10, None])
def test_each_part_saves_at_least_the_bytes_it_names(q_lora_rank: int | None) -> None:
    """Per token in FP64: of 3 layers and 2 depths, 5 blocks, 4 of them MoE."""
    config = small_config(q_lora_rank=q_lora_rank)
    tokens, held = 2 * 16, {part: step(part, q_lora_rank, torch.float64)[0] for part in PARTS}
    saved = {part: (held["nothing"] - held[part]) / (8 * tokens) for part in PARTS}
    # The routed and the shared products; the dense product.
    routed_and_shared = (config.top_k + config.num_shared_experts) * config.expert_ffn_size
    assert saved["swiglu"] >= 4 * routed_and_shared + config.ffn_size
    # Queries, keys and values, these padded to the width of keys.
    assert saved["mla_up"] >= 5 * config.num_heads * 3 * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    # Attention's input, the latents, the dense FFN's input, and both norms before eh_proj. The input of
    # a MoE FFN is the router's and the dispatcher's; whether it lives on is the runner's affair.
    latents = config.kv_lora_rank + (q_lora_rank or 0)
    assert saved["norm"] >= 5 * (config.hidden_size + latents) + config.hidden_size + 2 * 2 * config.hidden_size
    assert held["all"] < min(held[part] for part in ("norm", "swiglu", "mla_up"))


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
