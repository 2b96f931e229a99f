"""What FP8 keeps between forward and backward, and until a deferred W, to the byte."""

import gc
from typing import Any

import pytest
import torch
from moe_comm.local import LocalDispatcher
from torch import Tensor

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.fp8 import cast
from moe_runtime.fp8.policy import Choice, Policy
from moe_runtime.fp8.tiled import num_tiles
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.fp8_gated import Fp8Experts
from moe_runtime.model.fp8_linear import Fp8Multiplier
from moe_runtime.model.fp8_model import use_fp8
from moe_runtime.model.fp8_operands import Kit
from moe_runtime.model.transformer import Transformer
from tests.dist.live_bytes import LiveBytes
from tests.unit.model.samples import draw, small_config

BF16 = torch.bfloat16
M, K, N = 256, 384, 640


def tile_bytes(rows: int, columns: int) -> int:
    """Codes, and a float32 scale for each 128."""
    return rows * columns + 4 * rows * num_tiles(columns)


class Kept:
    """A sink that keeps closures."""

    def __init__(self) -> None:
        self.closures: list[Any] = []

    def __call__(self, weight: Tensor, accumulate: Any, deferrable: bool) -> None:
        self.closures.append(accumulate)


def meter_with(kit: Kit, *weights: Tensor) -> LiveBytes:
    """A meter that leaves weights and their casts out."""
    for weight in weights:
        kit.weights.blocks(weight)
        kit.weights.transposed(weight)
    return LiveBytes([*weights, *kit.weights.tensors()])


def test_a_linear_keeps_tiles_and_a_deferred_weight_gradient_two_of_them() -> None:
    kit = Kit(Choice(), WeightCasts(), cast)
    weight, sink = draw(N, K, dtype=BF16, grad=True), Kept()
    weight.grad_sink = sink  # type: ignore[attr-defined]
    with meter_with(kit, weight) as meter:
        x = draw(M, K, dtype=BF16) * 1
        y = Fp8Multiplier(kit)(x.requires_grad_(), weight)
        del x
        gc.collect()
        # x is a leaf, whose node for its gradient keeps it; through a product it would be free.
        assert meter.now - y.nbytes - 2 * M * K == tile_bytes(M, K)
        y.sum().backward()
        del y
        gc.collect()
        padded = tile_bytes(N, M)
        assert meter.now - 2 * 2 * M * K <= tile_bytes(M, K) + padded, (
            "more than x's tiles and dy's columns waits"
        )
    assert len(sink.closures) == 1


@pytest.mark.parametrize("counts", [[100, 0, 156], [0, 256, 0]])
def test_experts_keep_tiles_of_rows_and_of_gate_up_alone(counts: list[int]) -> None:
    kit, f = Kit(Choice(), WeightCasts(), cast), 128
    gate_up, down = draw(3, 2 * f, K, dtype=BF16, grad=True), draw(3, K, f, dtype=BF16, grad=True)
    weights, given = draw(M, dtype=torch.float32).abs(), torch.tensor(counts)
    with meter_with(kit, gate_up, down) as meter:
        rows = draw(M, K, dtype=BF16)
        y = Fp8Experts(kit)(rows, weights, gate_up, down, given)
        del rows
        gc.collect()
        small = weights.nbytes + given.nbytes
        assert meter.now - y.nbytes <= tile_bytes(M, K) + tile_bytes(M, 2 * f) + small + 64
    assert y.requires_grad


WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "num_layers": 1,
    "ffn_size": 640,
    "num_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 16,
    "v_head_dim": 128,
    "expert_ffn_size": 128,
    "num_shared_experts": 1,
    "mtp_depth": 0,
    "init_std": 0.05,
}
TOKENS = 256


def held(config: ModelConfig, is_fp8: bool, recompute: dict[str, bool]) -> float:
    """Bytes a token that one block keeps for its backward, beside its input."""
    model = Transformer(
        config,
        has_head=False,
        recompute=RecomputeConfig(**recompute),
        dtype=BF16,
        dispatcher=LocalDispatcher(config.num_experts, keep_tiles=is_fp8),
    )
    model.init_weights(1)
    casts = WeightCasts()
    if is_fp8:
        use_fp8(model, Policy(), casts)
    phases = tuple(phase for phase in model.phases() if phase.name != "embed")
    resid, tokens = (
        draw(1, TOKENS, config.hidden_size, dtype=BF16),
        torch.zeros(1, TOKENS + 1, dtype=torch.int64),
    )
    model.run_phases(phases, {"tokens": tokens, "resid": resid})
    with LiveBytes([*model.parameters(), *model.buffers(), *casts.tensors(), resid]) as meter:
        state = {"tokens": tokens, "resid": resid}
        model.run_phases(phases, state)
        out = state["resid"]
        state.clear()
        gc.collect()
        kept = meter.now - out.nbytes
    assert out.requires_grad
    return kept / TOKENS


@pytest.mark.parametrize("dense", [0, 1], ids=["MoE", "dense"])
def test_a_block_keeps_half_of_what_it_keeps_in_bf16(dense: int) -> None:
    """Near V3's proportions. Recomputing all: 0.55; nothing: 0.7; never more than the table says."""
    config = small_config(**WIDE, num_dense_layers=dense)
    everything = dict.fromkeys(("norm", "swiglu", "mla_up"), True)
    small, plain = held(config, True, everything), held(config, False, everything)
    assert small <= 0.55 * plain
    assert held(config, True, {}) <= 0.7 * held(config, False, {})
    # Kept: the stream before ffn_norm; both latents and the rotary key as their norms read them, E5M6 of what
    # attention put out, its row sums, and tiles of what goes through the FFN.
    latents = config.q_lora_rank + config.kv_lora_rank + config.qk_rope_head_dim  # type: ignore[operator]
    out = config.num_heads * config.v_head_dim
    total = 2 * config.hidden_size + 2 * latents + 1.5 * out + 4 * config.num_heads
    if dense:
        total += 2 * config.ffn_size
    else:
        total += config.top_k * (config.hidden_size + 2 * config.expert_ffn_size) + 2 * config.expert_ffn_size
        total += 4 * 4 * config.num_experts + 8 * 4 * config.top_k  # what routing keeps
    assert small <= 1.07 * total
