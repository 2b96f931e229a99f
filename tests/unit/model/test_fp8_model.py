"""A model under the policy: what becomes FP8, what is shared and kept, and what becomes stale."""

from collections import Counter
from typing import Any

import pytest
import torch
from moe_comm.local import LocalDispatcher
from torch import Tensor

from moe_runtime.config.fp8 import FP8_MODULES, Fp8Config
from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.fp8 import cast
from moe_runtime.fp8.policy import Policy
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.linear import PlainMultiplier
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import draw_tokens, small_config, unsettle

WIDE: dict[str, Any] = {
    "hidden_size": 136,
    "q_lora_rank": 72,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "ffn_size": 200,
    "expert_ffn_size": 72,
    "init_std": 0.05,
    "num_layers": 2,
    "mtp_depth": 1,
    "top_k": 3,
    "num_groups_kept": 2,
}
RECOMPUTES = {
    "nothing": {},
    "norm": {"norm": True},
    "swiglu": {"swiglu": True},
    "mla_up": {"mla_up": True},
    "all": {"norm": True, "swiglu": True, "mla_up": True},
}


class CountingCasts:
    """`fp8.cast`, with a count of what is called."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        fn = getattr(cast, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return fn(*args, **kwargs)

        return counted


def fp8_model(
    config: Fp8Config | None = None, keep_tiles: bool = True, casts: Any = cast, **settings: Any
) -> tuple[Transformer, WeightCasts]:
    changes = {key: settings.pop(key) for key in list(settings) if key in WIDE}
    model = Transformer(
        small_config(**(WIDE | changes)),
        dtype=torch.bfloat16,
        dispatcher=LocalDispatcher(8, keep_tiles=keep_tiles),
        **settings,
    )
    model.init_weights(3)
    unsettle(model)
    weights = WeightCasts()
    use_fp8(model, Policy(config), weights, casts)
    return model, weights


def gradients(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    losses = model.losses(tokens)
    (losses.loss + 0.3 * losses.loss_mtp + 0.1 * losses.balance).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def sample() -> Tensor:
    return draw_tokens(small_config(**WIDE), 2, 30 + 2)


def test_the_table_says_which_modules_become_fp8() -> None:
    model = Transformer(small_config(**WIDE), dtype=torch.bfloat16)
    names = use_fp8(model, Policy(), WeightCasts())
    attn = [f"attn.{name}" for name in ("q_a", "q_b", "kv_a", "kv_b", "o")]
    routed = [*attn, "moe.shared", "moe.experts"]
    expected = [f"layers.0.{name}" for name in (*attn, "ffn")]
    expected += [f"{layer}.{name}" for layer in ("layers.1", "mtp.0.block") for name in routed]
    assert sorted(names) == sorted(expected)
    high = [model.head, model.mtp["0"].eh_proj]  # type: ignore[union-attr]
    assert all(isinstance(linear.multiplier, PlainMultiplier) for linear in high)


@pytest.mark.parametrize(
    ("entry", "gone"),
    [
        ("attn.o", {"layers.0.attn.o", "layers.1.attn.o", "mtp.0.block.attn.o"}),
        (
            "layers.0",
            {f"layers.0.{m}" for m in ("attn.q_a", "attn.q_b", "attn.kv_a", "attn.kv_b", "attn.o", "ffn")},
        ),
        ("mtp.0.moe", {"mtp.0.block.moe.shared", "mtp.0.block.moe.experts"}),
        ("head", set()),
    ],
)
def test_what_is_named_stays_high(entry: str, gone: set[str]) -> None:
    def names(config: Fp8Config | None) -> set[str]:
        return set(use_fp8(Transformer(small_config(**WIDE)), Policy(config), WeightCasts()))

    assert names(None) - names(Fp8Config(keep_high=(entry,))) == gone


def test_every_module_of_the_config_has_its_line_in_the_table() -> None:
    import moe_runtime.fp8.policy as policy

    assert all(module in str(policy.__doc__) for module in FP8_MODULES)


@pytest.mark.parametrize("q_lora_rank", [72, None])
def test_recomputing_changes_no_bit(q_lora_rank: int | None) -> None:
    tokens = sample()
    wanted = gradients(fp8_model(q_lora_rank=q_lora_rank)[0], tokens)
    for name, parts in RECOMPUTES.items():
        model = fp8_model(q_lora_rank=q_lora_rank, recompute=RecomputeConfig(**parts))[0]
        got = gradients(model, tokens)
        assert got.keys() == wanted.keys()
        for param, grad in got.items():
            assert torch.equal(grad, wanted[param]), f"{name}: {param}"


@pytest.mark.parametrize("keep_tiles", [False, True])
def test_gradients_are_near_those_of_bf16_and_not_the_same(keep_tiles: bool) -> None:
    """One dense and one MoE layer, all experts chosen, so that no token takes another way."""
    tokens = draw_tokens(small_config(), 4, 64 + 1)
    model, _ = fp8_model(keep_tiles=keep_tiles, top_k=8, num_groups_kept=4, mtp_depth=0)
    plain = Transformer(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    exact, got = gradients(plain, tokens), gradients(model, tokens)
    apart = {
        name: float((got[name] - grad).float().norm() / grad.float().norm()) for name, grad in exact.items()
    }
    assert 0.01 < sum(apart.values()) / len(apart) < 0.4, apart
    with torch.no_grad():
        assert abs(float(model.losses(tokens).loss) - float(plain.losses(tokens).loss)) < 0.02


def test_one_cast_serves_all_that_read_a_norm_and_weights_are_cast_once() -> None:
    casts = CountingCasts()
    model, weights = fp8_model(casts=casts)
    tokens = sample()
    model.losses(tokens)
    # A block: attn_norm for q_a and kv_a, two latents, ffn_norm for shared, dispatcher or ffn.
    assert casts.calls["cast_normed"] == 3 * 4
    # attn.o's input, and gate_up's output of every SwiGLU, to be kept.
    assert casts.calls["cast_rows"] == 3 + 5
    assert casts.calls["cast_gated"] == 5
    made = weights.nbytes
    model.losses(tokens)
    assert weights.nbytes == made


def test_a_cast_of_a_weight_is_used_until_it_is_dropped_and_never_for_another_weight() -> None:
    made: list[Tensor] = []

    def counting(weight: Tensor) -> Any:
        made.append(weight)
        return cast.cast_weight_both(weight)

    weights, weight = WeightCasts(counting), torch.randn(40, 24)
    first = weights.blocks(weight)
    assert weights.blocks(weight) is first and weights.transposed(weight) is weights.transposed(weight)
    assert len(made) == 1
    weight.numpy()[0, 0] = 3.0  # no version tells of it
    assert weights.blocks(weight) is first, "this is why whoever writes weights has to drop their casts"
    weights.drop()
    assert weights.nbytes == 0 and not torch.equal(cast.decode(weights.blocks(weight)), cast.decode(first))
    with torch.no_grad():
        weight.mul_(2)  # a change that the version tells
    assert torch.equal(cast.decode(weights.blocks(weight)), 2 * cast.decode(cast.cast_weight(weight / 2)))
    other = weight.clone()
    assert weights.blocks(other) is not weights.blocks(weight)
