"""Memory of a rank: against what an H200 measured, and what settings must change."""

import pytest

from moe_runtime.cli.bench_slice.shapes import slice_config
from moe_runtime.config.counts import count_parameters
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.memory import ALLOWANCE, Memory, rank_memory
from moe_runtime.planner.reckon.states import held_by
from moe_runtime.schedule.builders import build

GIB = 2**30
# `bench train --device cuda` on one H200, docs/benchmarks.md: the fullest moment of 80 experts a layer.
MEASURED_GIB = {"bf16": 104.9, "fp8": 118.5}


@pytest.mark.parametrize("precision", MEASURED_GIB)
def test_a_slice_of_v3_needs_what_a_gpu_measured(precision: str) -> None:
    """That benchmark has masters of its own instead of ZeRO's, so the update takes nothing beside them."""
    config = RunConfig.model_validate(
        {
            "model": slice_config(80, 16384).model_dump(),
            "batch": {"seq_len": 4096, "micro_batch_size": 2, "global_batch_size": 32},
            "precision": precision,
            "optim": {"moments": "fp8"},
            "device": "cuda",
            "data": {"path": "none"},
            "train": {"total_steps": 1},
        }
    )
    found = rank_memory(config, check_layout(config), build("single", 1, 16), 0, allowance=0.0)
    assert (found.states + found.running) / GIB == pytest.approx(MEASURED_GIB[precision], rel=0.02)


def _published(*overrides: str, rank: int = 7, imbalance: float = 1.0) -> Memory:
    config = load_config("v3_671b", overrides)
    layout = check_layout(config)
    return rank_memory(config, layout, build("dualpipe", 16, 120), rank, imbalance, allowance=0.0)


def test_the_published_run_fits_an_h800() -> None:
    found = _published("precision=fp8")
    assert found.total < 84_943_110_144
    assert found.total == pytest.approx(found.states + found.running)


def test_pipeline_ranks_together_hold_every_weight() -> None:
    config = load_config("v3_671b")
    layout = check_layout(config)
    held = [held_by(config.model, layout, rank) for rank in range(layout.pp)]
    directions = 2  # each holds all of it
    dense = sum(each.matrices + each.gains + each.tied for each in held) / directions
    experts = sum(each.experts for each in held) / directions * layout.ep
    counts = count_parameters(config.model)
    assert dense + experts == counts.total + counts.mtp


@pytest.mark.parametrize("setting", ["recompute.norm", "recompute.swiglu", "recompute.mla_up"])
def test_each_recompute_setting_saves_activations(setting: str) -> None:
    base = ("recompute.norm=false", "recompute.swiglu=false", "recompute.mla_up=false", "precision=bf16")
    every, less = _published(*base), _published(*base, f"{setting}=true")
    assert less.activations < every.activations
    assert less.states == every.states


def test_fp8_shrinks_activations_and_adds_casts() -> None:
    plain, fp8 = _published("precision=bf16"), _published("precision=fp8")
    assert fp8.activations < 0.9 * plain.activations
    assert plain.weight_casts == 0.0 < fp8.weight_casts
    kept_high = _published("precision=fp8", "fp8.keep_high=[moe.experts]")
    assert kept_high.weight_casts < fp8.weight_casts and kept_high.activations > fp8.activations


def test_rows_beyond_their_share_cost_memory() -> None:
    even, uneven = _published(), _published(imbalance=1.5)
    assert uneven.activations > even.activations and uneven.comm_buffers > even.comm_buffers
    assert uneven.states == even.states


def test_moments_are_stored_as_the_config_says() -> None:
    sizes = {kind: _published(f"optim.moments={kind}").moments for kind in ("fp32", "bf16", "fp8")}
    assert sizes["fp32"] == 2 * sizes["bf16"]
    assert sizes["fp8"] / sizes["bf16"] == pytest.approx((2 + 1 / 128) / 4)


def test_the_allowance_is_a_share_of_all_the_rest() -> None:
    config = load_config("v3_671b")
    layout, program = check_layout(config), build("dualpipe", 16, 120)
    bare = rank_memory(config, layout, program, 0, allowance=0.0)
    assert bare.allowance == 0.0
    assert rank_memory(config, layout, program, 0).total == pytest.approx((1 + ALLOWANCE) * bare.total)
