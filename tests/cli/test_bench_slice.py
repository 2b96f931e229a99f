"""The arithmetic behind the GPU benchmark of a slice: what is counted, what fits, what the table says."""

from pathlib import Path

import pytest

from moe_runtime.cli.bench import slice_precisions
from moe_runtime.cli.bench_slice.report import describe
from moe_runtime.cli.bench_slice.shapes import (
    GIB,
    PARAM_BYTES,
    TOKEN_BYTES,
    Operations,
    count_parameters,
    experts_that_fit,
    operations,
    slice_config,
)
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import small_config

CONFIGS = Path(__file__).parents[2] / "configs" / "run"


def test_deepseek_v3_costs_what_its_authors_say() -> None:
    """250 GFLOP a token at 4,096 tokens with causal attention, without MTP."""
    config = load_config(CONFIGS / "v3_671b.yaml").model
    per_token = operations(config, 1, 4096).total("causal") / 4096
    assert per_token == pytest.approx(250.5e9, rel=2e-3)


@pytest.mark.parametrize("rank", [None, 10])
def test_parameters_are_those_of_the_model_but_norms(rank: int | None) -> None:
    config = small_config(mtp_depth=0, q_lora_rank=rank)
    model = Transformer(config)
    matrices = [param.numel() for name, param in model.named_parameters() if not name.endswith("norm.weight")]
    assert count_parameters(config) == sum(matrices)


def test_both_conventions_differ_by_half_the_core() -> None:
    work = Operations(fp8=8.0, high=2.0, core=4.0)
    assert (work.total("causal"), work.total("full")) == (12.0, 14.0)
    assert work.seconds("causal", 2.0) == 6.0
    assert work.seconds("causal", 2.0, 4.0) == 2.0 + 2.0
    one, two = (operations(slice_config(16, 512), sequences, 64) for sequences in (1, 2))
    assert two.total("full") == 2 * one.total("full")


def test_as_many_experts_are_taken_as_fit() -> None:
    free = 80 * GIB
    experts = experts_that_fit(free, 16384, 4096)
    room = free - 8 * GIB - TOKEN_BYTES * 4096
    fits, does_not = (count_parameters(slice_config(e, 16384)) * PARAM_BYTES for e in (experts, experts + 8))
    assert experts % 8 == 0 and fits <= room < does_not
    with pytest.raises(ConfigError, match="expected memory for 16 experts"):
        experts_that_fit(40 * GIB, 16384, 4096)
    with pytest.raises(ConfigError, match="experts in eights, at least 16, got 12"):
        slice_config(12, 16384)


def test_precisions_are_checked_by_name() -> None:
    assert slice_precisions(None) == ("bf16", "fp8") and slice_precisions(["fp8", "fp8"]) == ("fp8",)
    with pytest.raises(ConfigError, match="expected --precision of bf16 or fp8, got 'fp4'"):
        slice_precisions(["fp4"])


def test_the_table_names_the_ratio_and_both_shares() -> None:
    one = {
        "step_s": 2.0,
        "step_s_range": [1.9, 2.1],
        "update_s": 0.1,
        "tokens_per_s": 100.0,
        "mfu_of_bf16_peak": {"causal": 0.25, "full": 0.5},
        "peak_gib": 70.0,
    }
    both = {"mfu_of_both_peaks": {"causal": 0.2, "full": 0.4}, "tokens_per_s": 130.0}
    result = {
        "device": "a GPU",
        "torch": "2",
        "settings": {"experts": 16, "vocab_size": 9, "microbatches": 4, "sequences": 2, "seq_len": 8},
        "parameters": 1e9,
        "flops_per_token": {"causal": 1e9, "full": 2e9},
        "peaks": {"bf16": 7e14, "fp8": 1.2e15, "copy": 3e12},
        "loss_at_the_same_weights": {"bf16": 9.0, "fp8": 9.01},
        "results": {"bf16": one, "fp8": one | both},
        "kernels": {},
        "peer": None,
    }
    text = describe(result)
    assert "FP8 over BF16: 1.30x tokens/s" in text
    assert "25.0% / 50.0% of the BF16 peak" in text and "20.0% / 40.0% with FP8 products" in text
