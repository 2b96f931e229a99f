"""The arithmetic behind the GPU benchmark of a slice: what is counted, what fits, what the table says."""

from pathlib import Path

import pytest
import torch

from moe_runtime.cli.bench import slice_precisions
from moe_runtime.cli.bench_slice.kernels import SHOWN, idle_between, kind_of, summarise
from moe_runtime.cli.bench_slice.measure import _each
from moe_runtime.cli.bench_slice.peer import compare, describe_peer
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
from moe_runtime.cli.bench_train import MODEL
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
    events = [("nvjet_tst_128x256", 6.0, 4), ("cast_rows_kernel", 3.0, 2), ("something", 1.0, 1)]
    one = {
        "step_s": 2.0,
        "step_s_range": [1.9, 2.1],
        "update_s": 0.1,
        "tokens_per_s": 100.0,
        "mfu_of_bf16_peak": {"causal": 0.25, "full": 0.5},
        "peak_gib": 70.0,
    }
    idle = idle_between([(5.0, 6.0, "c"), (0.0, 3.0, "a"), (1.0, 2.0, "b"), (7.5, 8.0, "c"), (8.5, 9.0, "c")])
    assert [(gap["ms"], gap["times"], gap["after"]) for gap in idle] == [(2.0, 1, "a"), (2.0, 2, "c")]
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
        "kernels": {"fp8": summarise(events) | {"elapsed_ms": 12.0, "idle": idle}},
        "fp8_products": {"dense": {"deepgemm": 7}},
        "failed": {"bf16": "Traceback: it broke"},
    }
    text = describe(result)
    assert "FP8 products, dense: deepgemm 7" in text and "idle: a -> c" in text
    assert "one microbatch in fp8: 12.0 ms, of which kernels 10.0 ms in 7 launches" in text
    assert (
        "60.0%  products" in text and "30.0%  casts" in text and "bf16 failed" in text and "it broke" in text
    )
    assert "FP8 over BF16: 1.30x tokens/s" in text
    assert "25.0% / 50.0% of the BF16 peak" in text and "20.0% / 40.0% with FP8 products" in text


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"),
        ("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("void deep_gemm::sm90_fp8_gemm_1d2d_impl<0u>", "products"),
        ("product_kernel", "products"),
        ("gated_backward_kernel", "casts"),
        ("cast_gated_tiles_kernel", "casts"),
        ("columns_of_packed_kernel", "casts"),
        ("swiglu_backward_kernel", "SwiGLU and heads"),
        ("permute_kernel", "moved rows"),
        ("void at::native::elementwise_kernel<direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
        ("whatever", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_times_of_kernels_add_up() -> None:
    found = summarise([(f"kernel {number}", 1.0 + number, 2) for number in range(SHOWN + 5)])
    assert len(found["kernels"]) == SHOWN + 1
    assert found["ms"] == pytest.approx(sum(kernel["ms"] for kernel in found["kernels"]))
    assert found["launches"] == sum(kernel["launches"] for kernel in found["kernels"])


def test_what_fails_in_one_precision_leaves_the_other() -> None:
    failed: dict[str, str] = {}
    ran = []

    def run(precision: str) -> None:
        if precision == "fp8":
            raise RuntimeError("no such kernel")
        ran.append(precision)

    for _ in range(2):
        _each(["fp8", "bf16"], run, failed)
    assert ran == ["bf16", "bf16"] and "no such kernel" in failed["fp8"]
    with pytest.raises(RuntimeError):
        _each(["fp8"], run, {}, (RuntimeError,))


def test_both_sides_start_from_one_loss_and_a_peer_that_fails_compiled_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(torch, "compile", lambda _: refuse)
    config = MODEL.model_validate(MODEL.model_dump() | {"num_layers": 2, "num_experts": 8, "vocab_size": 64})
    found = compare(config, torch.device("cpu"), 16, 1, compiled=True)
    assert found["loss"]["ours"] == pytest.approx(found["loss"]["peer"], rel=2e-3)
    assert set(found["ratio"]) == {"peer"} and "planted" in found["failed"]["compiled"]
    beside = {"device": "a GPU", "torch": "2", "experts": 16, "mfu_causal": {"ours": 0.5, "peer": 0.25}}
    text = describe_peer(found | beside)
    assert "50.0%" in text and "ours over peer: " in text and "compiled failed and is left out" in text
