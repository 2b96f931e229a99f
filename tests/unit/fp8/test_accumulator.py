"""The emulated accumulator of Hopper's tensor cores: what promotion every 128 products is for."""

import pytest
import torch

from moe_runtime.fp8.accumulator import narrow_product
from moe_runtime.fp8.cast import cast_rows, decode
from moe_runtime.fp8.gemm_reference import multiply_slowly

K = 4096


def operands(law: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand if law == "uniform" else torch.randn
    return draw(32, K, generator=generator), draw(32, K, generator=generator)


def errors(law: str, promote_every: int | None) -> tuple[float, float]:
    """(largest relative error of an element, relative error of the norm)."""
    left, right = (decode(cast_rows(x)) for x in operands(law))
    exact = left.double() @ right.double().t()
    error = (narrow_product(left, right, promote_every).double() - exact).abs()
    return float((error / exact.abs()).max()), float(error.norm() / exact.norm())


def test_sums_of_one_sign_lose_percents_unless_they_are_promoted() -> None:
    without, promoted = errors("uniform", None)[0], errors("uniform", 128)[0]
    assert without > 0.02
    assert promoted < 0.001 and promoted < without / 20


def test_sums_of_both_signs_lose_less_and_promotion_helps_too() -> None:
    without, promoted = errors("normal", None)[1], errors("normal", 128)[1]
    assert 0.0005 < without < 0.02
    assert promoted < without / 5


def test_promotion_gets_rarer_and_the_error_grows() -> None:
    largest = [errors("uniform", every)[0] for every in (128, 512, 2048)]
    assert largest == sorted(largest) and largest[-1] > 10 * largest[0]


def test_with_bits_enough_it_is_the_promoted_sum_of_the_reference() -> None:
    left, right = (cast_rows(x[:5, :320]) for x in operands("normal"))
    narrow = narrow_product(decode(left), decode(right), 128, bits=24)
    torch.testing.assert_close(narrow, multiply_slowly(left, right), rtol=1e-5, atol=1e-5)


def test_what_is_cut_is_cut_towards_zero_below_the_largest_addend() -> None:
    left = torch.tensor([[8192.0, 1.5, -1.5]])
    right = torch.ones(1, 3)
    assert narrow_product(left, right, None).item() == 8192.0  # 2^13: its fourteenth bit is 1
    assert narrow_product(left[:, :2], right[:, :2], None).item() == 8193.0
    assert narrow_product(left[:, :2] * 2.0**-20, right[:, :2], None).item() == 8193 * 2.0**-20


@pytest.mark.parametrize("promote_every", [None, 128])
def test_nothing_sums_to_nothing(promote_every: int | None) -> None:
    assert (narrow_product(torch.zeros(2, 256), torch.zeros(3, 256), promote_every) == 0).all()
    assert (narrow_product(torch.zeros(2, 0), torch.zeros(3, 0), promote_every) == 0).all()
