"""SwiGLU joined with its casts on a CPU: against FP64, values of every kind, ragged groups."""

import math

import pytest
import torch

from moe_runtime.fp8 import cast_cpu
from moe_runtime.fp8.cast import (
    cast_columns,
    cast_gated,
    cast_gated_tiles,
    cast_rows,
    decode,
    gated_backward_cast,
)
from moe_runtime.fp8.tiled import TILE, Groups, Tiles
from tests.unit.fp8.fp8_values import RAGGED, groups_of, same

F = 131


def gate_up_of(rows: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 2 * F, generator=generator)
    return x * torch.randn(rows, 1, generator=generator).mul(2).exp2()


def weights_of(rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(5)).sub_(0.2)


def exact_product(gate_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    gate, up = gate_up.double().chunk(2, dim=1)
    product = gate * torch.sigmoid(gate) * up
    return product if weights is None else product * weights.double().unsqueeze(1)


def assert_within_a_cast(tiles: Tiles, exact: torch.Tensor) -> None:
    """Tiles hold values that are off by FP32's rounding and one rounding to E4M3."""
    assert tiles.shape == exact.shape
    per_element = tiles.scales.double().repeat_interleave(TILE, 1)[:, : exact.shape[1]]
    bound = torch.maximum(exact.abs() * 2.0**-4, per_element * 2.0**-10) * (1 + 2.0**-18)
    assert ((decode(tiles).double() - exact).abs() <= bound).all()
    amax = torch.zeros_like(tiles.scales, dtype=torch.float64)
    for tile in range(amax.shape[1]):
        amax[:, tile] = exact[:, tile * TILE : (tile + 1) * TILE].abs().amax(1)
    # No scale is twice what it need be, but for a last place.
    assert (tiles.scales.double() * 224 < amax.clamp(min=2.0**-100) * (1 + 2.0**-18)).all()


def transposed(exact: torch.Tensor, groups: Groups) -> torch.Tensor:
    padded = torch.zeros(exact.shape[1], groups.num_padded, dtype=exact.dtype)
    row = place = 0
    for count, room in zip(groups.counts.tolist(), groups.padded_counts.tolist(), strict=True):
        padded[:, place : place + count] = exact[row : row + count].t()
        row, place = row + count, place + room
    return padded


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", RAGGED, ids=str)
def test_products_of_ragged_groups_are_those_of_fp64_and_one_cast(counts: list[int], weighted: bool) -> None:
    groups, rows = groups_of(counts), sum(counts)
    gate_up, weights = gate_up_of(rows), weights_of(rows) if weighted else None
    for dtype in (torch.float32, torch.bfloat16):
        assert_within_a_cast(
            cast_gated(gate_up.to(dtype), weights), exact_product(gate_up.to(dtype), weights)
        )
    tiles = cast_rows(gate_up)
    made = cast_gated_tiles(tiles, weights, groups)
    assert_within_a_cast(made, transposed(exact_product(decode(tiles), weights), groups))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("counts", RAGGED, ids=str)
def test_gradients_of_ragged_groups_are_those_of_fp64_and_one_cast(counts: list[int], weighted: bool) -> None:
    groups, rows = groups_of(counts), sum(counts)
    tiles, weights = cast_rows(gate_up_of(rows)), weights_of(rows) if weighted else None
    d_product = torch.randn(rows, F, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaf = decode(tiles).double().requires_grad_()
    weight_leaf = None if weights is None else weights.double().requires_grad_()
    exact_product_of_leaves(leaf, weight_leaf).backward(d_product.double())
    d_rows, d_columns, d_weights = gated_backward_cast(d_product, tiles, weights, groups)
    assert leaf.grad is not None
    # 1 + g (1 - sigmoid(g)) may cancel: a few last places of FP32 of the gradient's parts.
    assert_near_a_cast(d_rows, leaf.grad)
    assert_near_a_cast(d_columns, transposed(leaf.grad, groups))
    if weight_leaf is None:
        assert d_weights is None
    else:
        torch.testing.assert_close(d_weights.double(), weight_leaf.grad, rtol=1e-5, atol=1e-5)


def exact_product_of_leaves(gate_up: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    product = gate * torch.sigmoid(gate) * up
    return product if weights is None else product * weights.unsqueeze(1)


def assert_near_a_cast(tiles: Tiles, exact: torch.Tensor) -> None:
    per_element = tiles.scales.double().repeat_interleave(TILE, 1)[:, : exact.shape[1]]
    bound = torch.maximum(exact.abs() * 2.0**-4, per_element * 2.0**-10)
    assert ((decode(tiles).double() - exact).abs() <= bound * (1 + 2.0**-16) + 1e-5 * per_element).all()


def test_rows_and_columns_of_a_gradient_are_casts_of_one_tensor() -> None:
    tiles = cast_rows(gate_up_of(128))
    d_rows, d_columns, _ = gated_backward_cast(torch.ones(128, F), tiles)
    # Both lie within half a step of the same value, so within a step of each other.
    rows, columns = decode(d_rows), decode(d_columns).t()
    steps = torch.maximum(d_rows.scales.repeat_interleave(TILE, 1)[:, : 2 * F], d_columns.scales.t())
    assert ((rows - columns).abs() <= torch.maximum(rows.abs(), columns.abs()) / 8 + steps * 2.0**-9).all()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, weights = groups_of([300, 0, 400]), weights_of(700)
    gate_up = gate_up_of(700)[
        :, : 2 * 128
    ].contiguous()  # whole vectors: exp has one form, whatever the place
    tiles = cast_rows(gate_up)
    d_product = torch.ones(700, 128)

    def everything() -> list[Tiles]:
        d_rows, d_columns, _ = gated_backward_cast(d_product, tiles, weights, groups)
        return [cast_gated(gate_up, weights), cast_gated_tiles(tiles, weights, groups), d_rows, d_columns]

    whole = everything()
    monkeypatch.setattr(cast_cpu, "_CHUNK_ELEMENTS", 1000)
    assert all(same(*pair) for pair in zip(whole, everything(), strict=True))


def test_special_values_pass_as_fp32_has_them() -> None:
    gate_up = torch.ones(8, 256)
    gate_up[0], gate_up[1, 0], gate_up[2, 200], gate_up[3, :128] = 0.0, math.nan, math.inf, -math.inf
    gate_up[4, :128], gate_up[5, :128], gate_up[6] = -1e4, 1e30, 2.0**-90
    values = decode(cast_gated(gate_up))
    assert (values[0] == 0).all()
    assert values[1:4].isnan().all()  # minus infinity times a sigmoid of zero is NaN
    assert (values[4] == 0).all() and values[4].signbit().all()
    torch.testing.assert_close(values[5], torch.full((128,), 1e30), rtol=2.0**-4, atol=0)
    assert (values[6] == 0).all()  # 2^-181 is below the floor's quantum
    assert same(cast_gated_tiles(cast_rows(gate_up[4:])), cast_columns(exact_fp32(gate_up[4:])))


def exact_fp32(gate_up: torch.Tensor) -> torch.Tensor:
    """The product of what tiles hold of gate_up."""
    gate, up = decode(cast_rows(gate_up)).chunk(2, dim=1)
    return torch.nn.functional.silu(gate) * up
