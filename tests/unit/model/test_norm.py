"""RMSNorm: values and gradients against the formula."""

import pytest
import torch

from moe_runtime.model.norm import RMSNorm
from tests.unit.model.oracle import rms_norm
from tests.unit.model.samples import F64, draw

EPS = 1e-2  # large enough to show if it is added in the wrong place


def norm_with_gain(dim: int, dtype: torch.dtype = F64, eps: float = EPS) -> RMSNorm:
    norm = RMSNorm(dim, eps, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(draw(dim, seed=9))
    return norm


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 7), (2, 3, 5)])
def test_values_equal_the_formula_for_any_leading_axes(shape: tuple[int, ...]) -> None:
    norm, x = norm_with_gain(shape[-1]), draw(*shape) * 0.2
    torch.testing.assert_close(norm(x), rms_norm(x, norm.weight, EPS), rtol=1e-14, atol=1e-15)


def test_gradients_of_input_and_gain_pass_gradcheck() -> None:
    norm, x = norm_with_gain(6), (draw(2, 3, 6) * 0.2).requires_grad_()

    def run(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, {"weight": gain}, x)

    assert torch.autograd.gradcheck(run, (x, norm.weight))


def test_a_row_of_zeros_gives_zeros_and_finite_gradients() -> None:
    norm, x = norm_with_gain(6, eps=1e-6), torch.zeros(2, 6, dtype=F64, requires_grad=True)
    out = norm(x)
    out.sum().backward()
    assert not out.any()
    torch.testing.assert_close(x.grad, (norm.weight.detach() * 1e3).expand(2, 6))


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    norm, x = norm_with_gain(64, torch.bfloat16), draw(5, 64, dtype=torch.bfloat16)
    exact = rms_norm(x.to(F64), norm.weight.detach().to(F64), EPS)
    assert norm(x).dtype == torch.bfloat16
    # Half a unit in the last place is 2^-8 of the value at most; FP32 adds a little.
    assert ((norm(x).to(F64) - exact).abs() <= exact.abs() * 2.0**-7.99).all()


def test_recomputed_equals_forward_bit_for_bit() -> None:
    norm, x = norm_with_gain(7), draw(3, 7)
    again = norm.recomputed(x, users=2)
    assert torch.equal(again.take(), norm(x)) and torch.equal(again.take(), norm(x))
