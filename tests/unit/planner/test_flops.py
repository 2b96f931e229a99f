"""Training operations: the published figure, and what torch counts in a real step."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_runtime.config.load import load_config
from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.transformer import Transformer
from moe_runtime.planner.flops import token_flops
from tests.arch.sources import ROOT


def test_the_published_model_needs_250_billion_a_token():
    flops = token_flops(load_config("v3_671b").model, 4096)
    assert flops.main == pytest.approx(250e9, rel=0.005)
    assert flops.total > 1.04 * flops.main  # one MTP module and the head again


def _counted(model: ModelConfig, rows: int, seq: int) -> float:
    """What torch counts in a forward and backward, per token."""
    torch.manual_seed(0)
    whole = Transformer(model)
    whole.init_weights(0)
    tokens = torch.randint(model.vocab_size, (rows, seq + 1 + model.mtp_depth))
    # The other kernels for attention on a CPU are not among those that torch counts.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        losses = whole.losses(tokens)
        (losses.loss + losses.loss_mtp).backward()
    return counter.get_total_flops() / (rows * seq)


@pytest.mark.parametrize("changes", [[], ["model.q_lora_rank=null"], ["model.attention=mha"]])
def test_torch_counts_the_same_in_a_dense_model(changes):
    # Values as wide as keys: on a CPU narrower ones are filled up.
    dense = ["model.num_dense_layers=3", "model.v_head_dim=32", *changes]
    model = load_config(ROOT / "configs/run/ablations/base.yaml", dense).model
    seq = 64
    flops = token_flops(model, seq)
    # torch reckons the whole square of scores, we the half that a causal model looks at.
    square = flops.attention * (2 * seq / (seq + 1) - 1)
    assert flops.total + square == pytest.approx(_counted(model, 2, seq), rel=0.002)


def test_experts_cost_what_as_wide_a_dense_layer_costs():
    base = ROOT / "configs/run/ablations/base.yaml"
    moe = token_flops(load_config(base).model, 128)
    dense = token_flops(load_config(base, ["model.num_dense_layers=3"]).model, 128)
    router = 6 * 2 * 16 * 96
    assert moe.total - dense.total == router


def test_an_mtp_module_adds_a_layer_a_projection_and_the_head_again():
    base = ROOT / "configs/run/ablations/base.yaml"
    none, one, two = (
        token_flops(load_config(base, [f"model.mtp_depth={depth}"]).model, 128) for depth in range(3)
    )
    assert none.mtp == 0 and two.mtp == 2 * one.mtp and one.main == none.main
    assert one.mtp > 6 * (264 * 96 + 2 * 96 * 96)
