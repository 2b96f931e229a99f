"""Tiles carried by a tensor: who keeps them, who loses them, and what a reader by mistake sees."""

from typing import Any

import pytest
import torch
from moe_comm import Placement, moe_layer, open_dispatcher
from moe_comm.errors import CommError, InputError
from moe_comm.local import LocalDispatcher
from moe_comm.wire import codec
from moe_comm.wire.carried import (
    byte_scales,
    carry,
    carry_over,
    carry_part,
    decoded,
    float_scales,
    stand_in,
    tiles_of,
)
from moe_comm.wire.tile import dequantise_tiles, quantise_tiles
from torch import Tensor

from tests.unit.comm.routings import PATTERNS, draw
from tests.unit.comm.tile_readers import TileReader

HIDDEN = 200


def drawn_tiles(rows: int = 5, hidden: int = HIDDEN) -> tuple[Tensor, Tensor, Tensor]:
    values = torch.randn(rows, hidden, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return values, *quantise_tiles(values, "pow2")


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_stand_in_is_nan_of_the_right_shape_without_memory(rows: int) -> None:
    values, codes, scales = drawn_tiles(rows)
    rows_like = stand_in(codes, scales, torch.bfloat16)
    assert rows_like.shape == values.shape and rows_like.dtype == values.dtype
    assert rows_like.untyped_storage().nbytes() <= 2 and bool(rows_like.isnan().all())
    assert tiles_of(rows_like) == (codes, scales)
    assert torch.equal(decoded(rows_like), dequantise_tiles(codes, scales, torch.bfloat16))
    if rows:
        assert (rows_like @ values.t()).isnan().all()


def test_tiles_are_those_of_one_object_unless_handed_over() -> None:
    values, codes, scales = drawn_tiles()
    carry(values, codes, scales)
    assert decoded(values) is values
    for other in (values.view(-1, HIDDEN), values.detach(), values.clone()):
        assert tiles_of(other) is None
    flat = carry_over(values, values.view(5, 1, HIDDEN))
    assert tiles_of(flat) == (codes, scales)
    chosen = torch.tensor([3, 3, 0])
    for part in (slice(1, 3), chosen):
        found = tiles_of(carry_part(values, values[part], part))
        assert (
            found is not None and torch.equal(found[0], codes[part]) and torch.equal(found[1], scales[part])
        )
    bare = torch.zeros(5, HIDDEN)
    assert tiles_of(carry_over(bare, bare.clone())) is None
    assert tiles_of(carry_part(bare, bare[:2], slice(2))) is None


def test_values_changed_in_place_are_no_longer_what_the_tiles_say() -> None:
    values, codes, scales = drawn_tiles()
    seen = carry_over(carry(values, codes, scales), values.view(-1, HIDDEN))
    values.add_(1)
    for tensor in (values, seen):
        with pytest.raises(InputError, match="changed in place"):
            tiles_of(tensor)


@pytest.mark.parametrize("wrong", ["codes", "scales", "dtype"])
def test_tiles_of_another_shape_or_type_are_refused(wrong: str) -> None:
    values, codes, scales = drawn_tiles()
    codes = codes[:4] if wrong == "codes" else codes
    scales = scales[:, :1] if wrong == "scales" else scales.float() if wrong == "dtype" else scales
    with pytest.raises(InputError, match="tiles: expected"):
        carry(values, codes, scales)
    with pytest.raises(InputError, match="tiles: expected"):
        stand_in(codes, scales, torch.float32)


def test_scales_as_numbers_and_as_bytes_are_the_same_scales() -> None:
    exponents = torch.cat((torch.arange(1, 255), torch.tensor([255]))).to(torch.uint8).view(5, 51)
    numbers = float_scales(exponents)
    assert torch.equal(numbers.flatten()[:-1].double(), 2.0 ** (torch.arange(1, 255).double() - 127))
    assert numbers[-1, -1].isnan() and torch.equal(byte_scales(numbers), exponents)
    _, codes, scales = drawn_tiles()
    assert torch.equal(dequantise_tiles(codes, float_scales(scales)), dequantise_tiles(codes, scales))


@pytest.mark.parametrize("wire", ["auto", "bf16", "fp32", "fp8"])
@pytest.mark.parametrize("kind", ["auto", "local", "alltoall"])
def test_only_powers_of_two_can_be_kept(kind: str, wire: str) -> None:
    with pytest.raises(CommError, match=r"keep_tiles: expected wire fp8_pow2, got"):
        open_dispatcher(kind, Placement(4), wire=wire, keep_tiles=True)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_local_rows_carry_the_tiles_of_their_tokens(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(pattern, 1, dtype=torch.bfloat16, weight_dtype=torch.float32, hidden=HIDDEN)
    tokens, weights, ids = drawn.of(0)
    cast: list[int] = []

    def counted(rows: Tensor, scales: str) -> tuple[Tensor, Tensor]:
        cast.append(rows.shape[0])
        return quantise_tiles(rows, scales)

    monkeypatch.setattr(codec, "quantise_tiles", counted)
    dispatcher = open_dispatcher("auto", Placement(drawn.num_experts), wire="fp8_pow2", keep_tiles=True)
    received = dispatcher.dispatch(tokens, weights, ids).wait()
    rounded = dequantise_tiles(*quantise_tiles(tokens, "pow2"), torch.bfloat16)
    wanted = LocalDispatcher(drawn.num_experts).dispatch(rounded, weights, ids).wait()
    assert torch.equal(decoded(received.rows), wanted.rows) and tiles_of(received.rows) is not None
    d_rows = dispatcher.combine_backward(tokens, received.handle).wait()
    assert torch.equal(decoded(d_rows), wanted.rows) and tiles_of(d_rows) is not None
    assert cast == [tokens.shape[0]] * 2, "each token is cast once, however many experts it has"
    carry(tokens, *quantise_tiles(tokens, "pow2"))
    again = dispatcher.dispatch(tokens, weights, ids).wait()
    assert torch.equal(decoded(again.rows), wanted.rows) and len(cast) == 2, "what is cast is not cast again"


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_local_layer_has_the_gradients_of_decoded_rows(pattern: str, max_rows: int | None) -> None:
    """The oracle decodes at once: rounding straight through in front of a plain layer."""
    drawn = draw(pattern, 1, dtype=torch.float32, weight_dtype=torch.float32, hidden=HIDDEN)
    tokens, weights, ids = drawn.of(0)

    def run(dispatcher: LocalDispatcher, through: bool) -> list[Tensor]:
        experts = TileReader(drawn.num_experts, 0, drawn.num_experts, HIDDEN, torch.float32)
        x, w = tokens.clone().requires_grad_(), weights.clone().requires_grad_()
        output = moe_layer(dispatcher, _round(x) if through else x, w, ids, experts, [experts.matrices])
        output = _round_grad(output) if through else output
        output.square().sum().backward()
        assert all(experts.rows_had_tiles) is not through or not experts.rows_had_tiles
        return [output.detach(), x.grad, w.grad, experts.matrices.grad]

    wanted = run(LocalDispatcher(drawn.num_experts, max_rows), True)
    found = run(LocalDispatcher(drawn.num_experts, max_rows, keep_tiles=True), False)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


def _rounded(x: Tensor) -> Tensor:
    return dequantise_tiles(*quantise_tiles(x, "pow2"), x.dtype)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _rounded(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Tensor:
        return d_x


def _round(x: Tensor) -> Tensor:
    """E4M3 values of x; the gradient passes as it is."""
    return _RoundThrough.apply(x)


def _round_grad(x: Tensor) -> Tensor:
    """x as it is, whose gradient is rounded to E4M3."""
    x.register_hook(_rounded)
    return x
