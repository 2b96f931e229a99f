"""The tile quantiser on a CPU: against the loops of the reference, its error bounds, special values."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.errors import InputError, NumericsError
from moe_comm.wire import tile
from moe_comm.wire.formats import E4M3, encode_nearest
from moe_comm.wire.tile import FLOOR, ScaleKind, dequantise_tiles, num_tiles, quantise_tiles
from moe_comm.wire.tile_reference import reference_dequantise, reference_quantise

from tests.unit.comm.wire_values import heavy_tailed, on_ties, random_bits, same_bits, special_tiles

KINDS: list[ScaleKind] = ["fp32", "pow2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Whole tiles, one short tile, and both; one column.
WIDTHS = [1, 127, 128, 256, 300]
FP32 = st.floats(width=32)
TAME = st.floats(-(2.0**126), 2.0**126, width=32)


def inputs(columns: int) -> list[torch.Tensor]:
    return [
        torch.randn(5, columns, generator=torch.Generator().manual_seed(columns)),
        heavy_tailed(5, columns, seed=columns),
        random_bits(5, columns, seed=columns),
        special_tiles(columns),
        on_ties(columns),
    ]


def scale_values(scales: torch.Tensor) -> torch.Tensor:
    """Scales as FP64 numbers."""
    return scales.double() if scales.dtype == torch.float32 else torch.exp2(scales.double() - 127)


def error_bound(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the codec's docstring promises, in FP64, element by element."""
    per_element = scale_values(scales).repeat_interleave(tile.TILE, 1)[:, : values.shape[1]]
    magnitude = values.double().abs()
    bound = torch.maximum(magnitude * 2.0**-4, per_element * 2.0**-10)
    return bound + (magnitude * 2.0**-21 if scales.dtype == torch.float32 else 0)


@pytest.fixture
def flushed_subnormals() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cpu_form_gives_the_bits_of_the_reference(kind: ScaleKind, dtype: torch.dtype) -> None:
    for columns in WIDTHS if dtype == torch.float32 else [131]:
        for values in inputs(columns):
            codes, scales = quantise_tiles(values.to(dtype), kind)
            wanted_codes, wanted_scales = reference_quantise(values.to(dtype), kind)
            assert torch.equal(codes, wanted_codes)
            assert same_bits(scales, wanted_scales)
            assert same_bits(
                dequantise_tiles(codes, scales, dtype), reference_dequantise(codes, scales, dtype)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_any_code_under_any_scale_is_decoded_as_the_reference_does(kind: ScaleKind) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(8, 1)
    made = torch.arange(16, dtype=torch.uint8).view(8, 2) * 17
    scales = made if kind == "pow2" else random_bits(8, 2, seed=1).abs()
    wanted = reference_dequantise(codes, scales)
    # Encoding never gives a scale below 2^-109; under one, a product may be a subnormal and is rounded.
    assert same_bits(dequantise_tiles(codes, scales)[2:], wanted[2:])


def test_two_axes_of_ragged_rows_and_views_of_records_are_taken_as_they_lie() -> None:
    buffer = torch.randn(7, 400, generator=torch.Generator().manual_seed(0))
    view = buffer[::2, 3:303]
    codes, scales = quantise_tiles(view)
    record = torch.zeros(4, 500, dtype=torch.uint8)
    record[:, 1:301] = codes
    scale_record = torch.zeros(4, 9)
    scale_record[:, 2:5] = scales
    assert torch.equal(codes, quantise_tiles(view.contiguous())[0])
    assert torch.equal(quantise_tiles(view.t())[0], quantise_tiles(view.t().contiguous())[0])
    decoded = dequantise_tiles(record[:, 1:301], scale_record[:, 2:5])
    assert torch.equal(decoded, dequantise_tiles(codes, scales))


@pytest.mark.parametrize("shape", [(0, 300), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_encoded_as_nothing(shape: tuple[int, int], kind: ScaleKind) -> None:
    codes, scales = quantise_tiles(torch.ones(shape), kind)
    assert codes.shape == shape and scales.shape == (shape[0], num_tiles(shape[1]))
    assert torch.equal(dequantise_tiles(codes, scales), torch.ones(shape))


def test_chunks_and_threads_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    values = heavy_tailed(61, 300, seed=3)
    values[17, 5] = math.nan
    whole = [quantise_tiles(values, kind) for kind in KINDS]
    monkeypatch.setattr(tile, "_CHUNK_ELEMENTS", 1000)
    for kind, (codes, scales) in zip(KINDS, whole, strict=True):
        again, scales_again = quantise_tiles(values, kind)
        assert torch.equal(codes, again) and same_bits(scales, scales_again)
        monkeypatch.setattr(tile, "_CHUNK_ELEMENTS", 1 << 17)
        decoded = dequantise_tiles(codes, scales)
        monkeypatch.setattr(tile, "_CHUNK_ELEMENTS", 1000)
        assert same_bits(decoded, dequantise_tiles(codes, scales))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(FP32, min_size=1, max_size=8), width=st.integers(1, 260), start=st.integers(0, 259))
def test_any_numbers_come_back_within_the_bound_or_as_nan(
    kind: ScaleKind, numbers: list[float], width: int, start: int
) -> None:
    values = torch.zeros(1, width)
    values[0, : len(numbers)] = torch.tensor(numbers)[:width]
    values = values.roll(start, 1)
    codes, scales = quantise_tiles(values, kind)
    assert torch.equal(codes, reference_quantise(values, kind)[0])
    decoded = dequantise_tiles(codes, scales)
    for first in range(0, width, tile.TILE):
        part, back = values[:, first : first + tile.TILE], decoded[:, first : first + tile.TILE]
        assert back.isnan().all() if not part.isfinite().all() else not back.isnan().any()
        if part.abs().max() < 2.0**127:
            error = (back.double() - part.double()).abs()
            assert (error <= error_bound(part, scales[:, first // tile.TILE].unsqueeze(1))).all()
            assert torch.equal(back.signbit(), part.signbit())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(TAME, min_size=1, max_size=140))
def test_encoding_what_was_decoded_loses_nothing_more(kind: ScaleKind, numbers: list[float]) -> None:
    once = dequantise_tiles(*quantise_tiles(torch.tensor([numbers]), kind))
    twice = dequantise_tiles(*quantise_tiles(once, kind))
    if kind == "pow2":
        assert torch.equal(once, twice)
    else:
        # The scale is computed anew from a product that was rounded: a few last places of FP32.
        torch.testing.assert_close(once, twice, rtol=2.0**-21, atol=0)


@settings(max_examples=40, deadline=None)
@given(numbers=st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=16))
def test_a_power_of_two_passes_through_either_kind_of_scale(numbers: list[float]) -> None:
    """Codes do not depend on the unit: x and 2^20 x differ in the scale alone (above the floor)."""
    values = torch.tensor([[1.0, *numbers]])
    for kind in KINDS:
        codes, scales = quantise_tiles(values, kind)
        raised, raised_scales = quantise_tiles(values * 2.0**20, kind)
        assert torch.equal(codes, raised)
        assert torch.equal(scale_values(raised_scales), scale_values(scales) * 2.0**20)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_has_no_bias(kind: ScaleKind) -> None:
    """Mean error of a million normal numbers: within 5 sigma of zero, sigma from the errors themselves."""
    values = torch.randn(1000, 1024, generator=torch.Generator().manual_seed(5))
    error = dequantise_tiles(*quantise_tiles(values, kind)).double() - values.double()
    assert error.mean().abs() < 5 * error.std() / math.sqrt(error.numel())
    towards = (error * values.sign()).mean() / values.abs().mean()
    assert towards.abs() < 1e-3


def test_scales_are_those_that_the_definition_names() -> None:
    amax = torch.tensor([448.0, 449.0, 224.0, 225.0, 1.0, 0.0, FLOOR, 3.0e38, math.inf, math.nan])
    values = torch.stack([amax, torch.zeros_like(amax)], 1)
    _, exact = quantise_tiles(values, "fp32")
    floored = amax.clamp(min=FLOOR)
    torch.testing.assert_close(exact[:8, 0], floored[:8] / 448, rtol=2.0**-22, atol=0)
    assert exact[8:].isnan().all()
    _, powers = quantise_tiles(values, "pow2")
    assert powers[:, 0].tolist() == [127, 128, 126, 127, 119, 19, 19, 247, 255, 255]


@pytest.mark.usefixtures("flushed_subnormals")
@pytest.mark.parametrize("kind", KINDS)
def test_a_processor_that_flushes_subnormals_gives_the_same_bits(kind: ScaleKind) -> None:
    for values in inputs(300):
        codes, scales = quantise_tiles(values, kind)
        decoded = dequantise_tiles(codes, scales)
        torch.set_flush_denormal(False)
        assert torch.equal(codes, reference_quantise(values, kind)[0])
        assert same_bits(decoded, dequantise_tiles(codes, scales))
        torch.set_flush_denormal(True)


def bits_up_to(limit: float, step: int) -> Iterator[torch.Tensor]:
    """Every step-th FP32 bit pattern of magnitudes up to `limit`, in pieces, every second one negative."""
    end = int(torch.tensor(limit).view(torch.int32)) + 1
    piece = step << 17
    for index, first in enumerate(range(0, end, piece)):
        magnitudes = torch.arange(first, min(first + piece, end), step, dtype=torch.int32).view(torch.float32)
        yield magnitudes if index % 2 else -magnitudes


def casts_differ(values: torch.Tensor) -> bool:
    cast = values.to(torch.float8_e4m3fn).view(torch.uint8)
    return not torch.equal(cast, encode_nearest(values, E4M3))


def test_torch_rounds_as_the_integers_do_up_to_464() -> None:
    """Every boundary of a monotone function on both sides, and each 1,021st bit pattern in between."""
    grid = on_ties(512).flatten()
    ups, downs = (grid.nextafter(torch.tensor(side)) for side in (math.inf, -math.inf))
    assert not casts_differ(grid) and not casts_differ(ups) and not casts_differ(downs)
    # That the boundaries are met: an element in two is one, and the step across it changes the code.
    assert (encode_nearest(ups, E4M3) != encode_nearest(downs, E4M3)).float().mean() > 0.4
    assert not any(casts_differ(values) for values in bits_up_to(464.0, 1021))


@pytest.mark.slow
def test_torch_rounds_as_the_integers_do_on_every_bit_pattern_up_to_464() -> None:
    assert not any(casts_differ(values) for values in bits_up_to(464.0, 1))


def test_products_never_leave_the_range_where_torch_saturates() -> None:
    """amax x (448 / amax) in FP32 is at most 448 and two last places, for every mantissa."""
    amax = torch.arange(1 << 23, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    product = amax * torch.full_like(amax, 448.0).div_(amax)
    assert product.max() <= 448 * (1 + 2.0**-22)


def test_a_wrong_bit_anywhere_is_seen_by_the_comparison() -> None:
    values = heavy_tailed(3, 300, seed=9)
    codes, scales = quantise_tiles(values)
    codes[2, 299] ^= 1
    assert not torch.equal(codes, reference_quantise(values)[0])
    worse = dequantise_tiles(codes, scales * (1 + 2.0**-3))
    assert ((worse - values).abs() > error_bound(values, scales)).any()


def test_mistakes_are_named() -> None:
    with pytest.raises(InputError, match=r"expected values \[rows, columns\].*got shape \[3\]"):
        quantise_tiles(torch.ones(3))
    with pytest.raises(InputError, match="floating dtype of 16 to 64 bits"):
        quantise_tiles(torch.ones(2, 2, dtype=torch.int32))
    with pytest.raises(NumericsError, match="expected scales fp32 or pow2, got 'e8m0'"):
        quantise_tiles(torch.ones(2, 2), "e8m0")  # type: ignore[arg-type]
    codes, scales = quantise_tiles(torch.ones(2, 300))
    with pytest.raises(InputError, match=r"expected scales \[2, 3\]"):
        dequantise_tiles(codes, scales[:, :2])
    with pytest.raises(InputError, match="expected uint8 codes"):
        dequantise_tiles(codes.int(), scales)
    with pytest.raises(InputError, match="expected a floating dtype"):
        dequantise_tiles(codes, scales, torch.int32)
