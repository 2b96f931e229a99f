"""Products of FP8 operands: emulation against the promoted sum, and both against unquantised operands."""

import math

import pytest
import torch
from torch import Tensor

from moe_runtime.errors import NumericsError
from moe_runtime.fp8 import gemm_reference
from moe_runtime.fp8.cast import cast_columns, cast_rows, cast_weight, columns_of, decode
from moe_runtime.fp8.difference import difference, sqnr_db
from moe_runtime.fp8.gemm import multiply, multiply_groups, multiply_into, weight_grad_groups
from moe_runtime.fp8.gemm_reference import multiply_slowly
from moe_runtime.fp8.tiled import Blocks, Tiles
from tests.unit.fp8.fp8_values import groups_of, mixed

# (m, n, k) with (k / 128) % 4 != 0, m % 4 != 0, k % 128 != 0, less than one tile, one row, whole multiples.
SHAPES = [(130, 200, 640), (7, 129, 300), (1, 1, 1), (128, 256, 512), (3, 50, 130), (257, 127, 896)]
EMPTY = [(0, 5, 128), (5, 0, 128), (5, 6, 0)]
GROUPS = [[0, 131, 0, 1, 0], [133], [128, 256], [127, 129, 3, 0], [0, 0]]
MOST_DIFFERENCE, LEAST_SQNR_DB = 1e-3, 28.0


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_faithful(exact: Tensor, ours: Tensor) -> None:
    """The bounds of DeepGEMM and torchao, against a product of unquantised operands in FP64."""
    assert ours.shape == exact.shape
    assert difference(exact, ours) < MOST_DIFFERENCE
    assert sqnr_db(exact, ours) >= LEAST_SQNR_DB


def assert_same_but_for_sums(ours: Tensor, slow: Tensor, left: Tiles, right: Tiles | Blocks) -> None:
    """Equal up to the rounding of FP32 sums, and of the result if it is BF16."""
    size = decode(left).double().abs() @ decode(right).double().abs().t()
    rounding = 2.0**-8 * slow.abs() if ours.dtype == torch.bfloat16 else 0.0
    assert ((ours.double() - slow.double()).abs() <= 2.0**-19 * size + rounding).all()


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulation_is_the_promoted_sum(shape: tuple[int, int, int], out_dtype: torch.dtype) -> None:
    m, n, k = shape
    x, w = mixed(m, k, 1).clamp(-1e9, 1e9) if m * k else torch.ones(m, k), randn(n, k, seed=2)
    for scales in ("pow2", "fp32"):
        left = cast_rows(x, scales)
        for right in (cast_weight(w), cast_rows(w, scales)):
            made = multiply(left, right, out_dtype)
            assert made.dtype == out_dtype and list(made.shape) == [m, n]
            assert_same_but_for_sums(made, multiply_slowly(left, right), left, right)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_three_products_of_a_linear_are_faithful(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w, dy = randn(m, k, seed=1), randn(n, k, seed=2), randn(m, n, seed=3)
    if min(shape) < 4:  # too few elements to judge an average; the signs do
        x, w, dy = x.sign(), w.sign(), dy.sign()
    tiles, blocks = cast_rows(x), cast_weight(w)
    exact_x, exact_w, exact_dy = x.double(), w.double(), dy.double()
    assert_faithful(exact_x @ exact_w.t(), multiply(tiles, blocks, torch.float32))
    assert_faithful(exact_dy @ exact_w, multiply(cast_rows(dy), blocks.transposed(), torch.float32))
    grad = multiply(cast_columns(dy), columns_of(tiles), torch.float32)
    assert_faithful(exact_dy.t() @ exact_x, grad)


@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_all_three_products_of_grouped_experts_are_faithful(counts: list[int]) -> None:
    groups, rows, n, k = groups_of(counts), sum(counts), 150, 300
    x, dy = randn(rows, k, seed=1), randn(rows, n, seed=2)
    w = randn(len(counts), n, k, seed=3)
    tiles, blocks = cast_rows(x), cast_weight(w)
    y = multiply_groups(tiles, blocks, groups, torch.float32)
    dx = multiply_groups(cast_rows(dy), blocks.transposed(), groups, torch.float32)
    dw = torch.full((len(counts), n, k), math.nan)
    weight_grad_groups(dw, cast_columns(dy, groups), columns_of(tiles, groups), groups, accumulate=False)
    exact_y, exact_dx, exact_dw = torch.zeros_like(y), torch.zeros_like(dx), torch.zeros_like(dw)
    start = 0
    for group, count in enumerate(counts):
        span = slice(start, start + count)
        exact_y[span] = x[span] @ w[group].t()
        exact_dx[span] = dy[span] @ w[group]
        exact_dw[group] = dy[span].t() @ x[span]
        assert count or (dw[group] == 0).all()
        for exact, ours in ((exact_y, y), (exact_dx, dx)):
            # A single row scatters; a wrong one would be off by about 1.
            assert difference(exact[span], ours[span]) < 2 * MOST_DIFFERENCE
        start += count
    for exact, ours in ((exact_y, y), (exact_dx, dx), (exact_dw, dw)):
        assert_faithful(exact, ours)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_add_to_what_is_there(out_dtype: torch.dtype) -> None:
    groups = groups_of([130, 0, 3])
    left, right = cast_columns(randn(133, 20, seed=1), groups), cast_columns(randn(133, 30, seed=2), groups)
    once = weight_grad_groups(torch.full((3, 20, 30), 9.0, dtype=out_dtype), left, right, groups, False)
    twice = weight_grad_groups(torch.ones(3, 20, 30, dtype=out_dtype), left, right, groups, True)
    rounding = 1e-6 if out_dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(twice, once + 1, rtol=rounding, atol=rounding)
    assert (twice[1] == 1).all()
    dense = multiply(left, right, out_dtype)
    added = multiply_into(torch.ones(20, 30, dtype=out_dtype), left, right, True)
    torch.testing.assert_close(added, dense + 1, rtol=rounding, atol=rounding)


def test_a_row_that_is_not_finite_spoils_its_own_results_and_no_others() -> None:
    x, w, groups = randn(140, 256, seed=1), randn(2, 130, 256, seed=2), groups_of([10, 130])
    x[12, 3], w[0, 129, 200] = math.inf, math.nan
    y = multiply_groups(cast_rows(x), cast_weight(w), groups)
    spoilt = torch.zeros(140, 130, dtype=torch.bool)
    spoilt[12] = True
    spoilt[:10, 128:] = True
    assert torch.equal(y.isnan(), spoilt)
    slow = multiply_slowly(cast_rows(x[:10]), Blocks(cast_weight(w).codes[0], cast_weight(w).scales[0]))
    assert torch.equal(slow.isnan(), spoilt[:10])
    assert multiply(cast_rows(torch.zeros(3, 256)), cast_weight(w[1])).eq(0).all()


@pytest.mark.parametrize(("factor", "result"), [(2.0**-110, 0.0), (2.0**60, 2.0**120)])
def test_tiny_and_huge_operands_multiply_as_fp32_does(factor: float, result: float) -> None:
    x = torch.full((2, 128), factor)
    for out_dtype in (torch.float32, torch.bfloat16):
        made = multiply(cast_rows(x), cast_rows(x), out_dtype)
        assert (made == result * 128).all()


def test_mistakes_are_named() -> None:
    tiles, blocks, groups = (
        cast_rows(torch.ones(4, 128)),
        cast_weight(torch.ones(2, 5, 128)),
        groups_of([1, 3]),
    )
    one = Blocks(blocks.codes[0], blocks.scales[0])
    expected = {
        "of one depth, got 128 and 100": lambda: multiply(tiles, cast_rows(torch.ones(4, 100))),
        "out of bfloat16 or float32": lambda: multiply(tiles, one, torch.float16),
        r"out \[4, 5\], got \[4, 6\]": lambda: multiply_into(torch.ones(4, 6), tiles, one, False),
        "operand of two axes": lambda: multiply(tiles, blocks),
        r"scales \[4, 1\], got \[4, 2\]": lambda: multiply(Tiles(tiles.codes, torch.ones(4, 2)), one),
        "2 groups, got 1": lambda: multiply_groups(tiles, blocks, groups_of([4])),
        "groups of 4 rows": lambda: multiply_groups(tiles, blocks, groups_of([1, 2])),
        r"right \[groups, n, k\]": lambda: multiply_groups(tiles, one, groups),
        "256 tokens, got 128": lambda: weight_grad_groups(torch.ones(2, 4, 4), tiles, tiles, groups, True),
    }
    for message, call in expected.items():
        with pytest.raises(NumericsError, match=message):
            call()


def test_bf16_units_are_used_only_where_decoding_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []

    def spy(matrix: Tiles, dtype: torch.dtype) -> Tensor:
        used.append(dtype)
        return decode(matrix, dtype)

    monkeypatch.setattr(gemm_reference, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr(gemm_reference, "decode", spy)
    x = randn(4, 128, seed=1)
    for scales, out_dtype in (("pow2", torch.bfloat16), ("fp32", torch.bfloat16), ("pow2", torch.float32)):
        multiply(cast_rows(x, scales), cast_rows(x, scales), out_dtype)
    assert used == [torch.bfloat16] * 2 + [torch.float32] * 4
