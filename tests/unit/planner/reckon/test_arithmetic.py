"""What a config keeps in BF16 is planned in BF16, and its casts are not made."""

import pytest

from moe_runtime.config.fp8 import Fp8Config
from moe_runtime.config.load import load_config
from moe_runtime.planner.reckon.arithmetic import as_configured
from moe_runtime.planner.reckon.kernels import Kernel, Move, Phases, Product, Shape, attend, experts

SHAPE = Shape(tokens=4096, seq_len=4096, rows=32768, local_experts=4, fp8=True)


def names(kernels: tuple[Kernel, ...]) -> tuple[set[str], set[str]]:
    """Of products in FP8, and of casts."""
    products = {one.name for one in kernels if isinstance(one, Product) and one.fp8}
    casts = ("cast for", "columns for")
    return products, {one.name for one in kernels if isinstance(one, Move) and one.name.startswith(casts)}


@pytest.fixture(scope="module")
def block() -> Phases:
    config = load_config("v3_671b")
    return attend(config.model, SHAPE, config.recompute, router=True)


def test_the_default_keeps_what_the_kernels_say(block: Phases) -> None:
    assert as_configured(block, Fp8Config()) == block
    assert names(block.forward)[0] == {"q and kv down", "q up", "kv up", "o"}  # the router is not


def test_a_pass_in_bf16_has_neither_products_nor_casts_in_fp8(block: Phases) -> None:
    kept = as_configured(block, Fp8Config(dgrad="bf16"))
    assert kept.forward == block.forward and kept.weight_grad == block.weight_grad
    products, casts = names(kept.input_grad)
    assert products == {"q up", "kv up"}  # recomputed forwards
    assert not casts


def test_a_module_kept_high_is_so_in_all_passes(block: Phases) -> None:
    kept = as_configured(block, Fp8Config(keep_high=("attn.o",)))
    for before, after, name in zip(
        (block.forward, block.input_grad, block.weight_grad),
        (kept.forward, kept.input_grad, kept.weight_grad),
        ("o", "o, dX", "o, dW"),
        strict=True,
    ):
        assert names(before)[0] - names(after)[0] == {name}
        assert len(names(before)[1] - names(after)[1]) == 1


def test_experts_are_kept_high_by_the_module_above_them() -> None:
    config = load_config("v3_671b")
    kept = as_configured(experts(config.model, SHAPE, config.recompute), Fp8Config(keep_high=("moe",)))
    assert names((*kept.forward, *kept.input_grad, *kept.weight_grad)) == (set(), set())
