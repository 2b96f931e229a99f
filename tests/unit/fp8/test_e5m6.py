"""E5M6: against the fractions of the reference, every code, packing of odd widths, retiling to E4M3."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import NumericsError
from moe_runtime.fp8 import e5m6
from moe_runtime.fp8.cast import cast_columns
from moe_runtime.fp8.cast_reference import E5M6_LAW, reference_tile, reference_value
from moe_runtime.fp8.difference import sqnr_db
from moe_runtime.fp8.e5m6 import Packed, columns_of_packed, pack_e5m6, packed_width, unpack_e5m6
from moe_runtime.fp8.tiled import TILE, num_tiles
from tests.unit.comm.wire_values import random_bits, same_bits, special_tiles
from tests.unit.fp8.fp8_values import RAGGED, groups_of, mixed, poisoned, same


def codes_of(packed: Packed) -> torch.Tensor:
    """The twelve bits of each value, read byte by byte."""
    rows, columns = packed.shape
    codes = torch.zeros(rows, columns, dtype=torch.int32)
    for row in range(rows):
        data = packed.data[row].tolist()
        for column in range(columns):
            nibbles = data[columns + column // 2]
            codes[row, column] = data[column] << 4 | (nibbles >> 4 if column % 2 else nibbles & 15)
    return codes


def assert_packed_as_the_reference(x: torch.Tensor) -> None:
    packed, values = pack_e5m6(x), unpack_e5m6(pack_e5m6(x))
    assert list(packed.data.shape) == [x.shape[0], (3 * x.shape[1] + 1) // 2]
    codes = codes_of(packed)
    for row in range(x.shape[0]):
        for tile in range(num_tiles(x.shape[1])):
            span = slice(tile * TILE, (tile + 1) * TILE)
            wanted, scale = reference_tile(x[row, span].float().tolist(), E5M6_LAW)
            assert codes[row, span].tolist() == wanted
            assert same_bits(packed.scales[row, tile], torch.tensor(scale))
            back = torch.tensor([reference_value(code, scale, E5M6_LAW) for code in wanted])
            assert same_bits(values[row, span], back)


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 261])
def test_values_are_packed_as_the_reference_says(columns: int) -> None:
    for x in (mixed(6, columns, 1), special_tiles(columns), random_bits(4, columns, 2)):
        assert_packed_as_the_reference(x)
    assert_packed_as_the_reference(mixed(6, columns, 3).bfloat16())


def test_every_code_comes_back_as_itself_and_every_midpoint_goes_to_the_even_code() -> None:
    codes = torch.arange(0x7C0, dtype=torch.int32)
    values = (codes << 4).to(torch.int16).view(torch.float16).float()
    assert values[-1] == e5m6.MAX and values[1] == 2.0**-20
    assert torch.equal(e5m6.round_to_codes(values), codes)
    assert torch.equal(e5m6.round_to_codes(-values), codes | 0x800)
    middles = (values[1:] + values[:-1]) / 2
    assert torch.equal(e5m6.round_to_codes(middles), codes[:-1] + codes[:-1] % 2)
    above, below = (torch.nextafter(middles, torch.tensor(end)) for end in (math.inf, 0.0))
    assert torch.equal(e5m6.round_to_codes(above), codes[1:])
    assert torch.equal(e5m6.round_to_codes(below), codes[:-1])


@settings(max_examples=50, deadline=None)
@given(
    numbers=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=6),
    width=st.integers(1, 140),
)
def test_the_error_is_within_its_bound(numbers: list[float], width: int) -> None:
    x = torch.zeros(1, width)
    x[0, : len(numbers)] = torch.tensor(numbers)[:width]
    packed = pack_e5m6(x)
    per_element = packed.scales.double().repeat_interleave(TILE, 1)[:, :width]
    bound = torch.maximum(x.double().abs() * 2.0**-7, per_element * 2.0**-21)
    error = (unpack_e5m6(packed).double() - x.double()).abs()
    assert (error <= bound).all()
    assert torch.equal(unpack_e5m6(packed, torch.bfloat16).float(), unpack_e5m6(packed))


@pytest.mark.parametrize("counts", RAGGED, ids=str)
def test_columns_are_the_cast_of_the_unpacked_values(counts: list[int]) -> None:
    groups = groups_of(counts)
    for x in (mixed(sum(counts), 131, 4), poisoned(mixed(sum(counts), 131, 5))):
        packed = pack_e5m6(x)
        assert same(columns_of_packed(packed, groups), cast_columns(unpack_e5m6(packed), groups))
    assert same(columns_of_packed(packed), cast_columns(unpack_e5m6(packed)))


def test_it_is_finer_than_e4m3_by_three_bits_and_packed_in_one_and_a_half_bytes() -> None:
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    packed = pack_e5m6(x)
    assert sqnr_db(x, unpack_e5m6(packed)) > 48  # E4M3: 31.5; three bits are 18 dB
    assert packed.nbytes == 256 * (768 + 4 * 4)
    assert [packed_width(columns) for columns in (0, 1, 2, 3)] == [0, 2, 3, 5]


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = poisoned(mixed(50, 131, 6))
    whole = pack_e5m6(x)
    monkeypatch.setattr(e5m6, "_CHUNK_ELEMENTS", 1000)
    again = pack_e5m6(x)
    assert torch.equal(whole.data, again.data) and same_bits(whole.scales, again.scales)
    assert same_bits(unpack_e5m6(again, torch.bfloat16), unpack_e5m6(whole).bfloat16())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_is_packed_as_nothing(shape: tuple[int, int]) -> None:
    packed = pack_e5m6(torch.ones(shape))
    assert unpack_e5m6(packed).shape == shape
    assert columns_of_packed(packed).shape == (shape[1], -(-shape[0] // TILE) * TILE)


def test_mistakes_are_named() -> None:
    with pytest.raises(NumericsError, match=r"expected values \[rows, columns\]"):
        pack_e5m6(torch.ones(3, dtype=torch.float32))
    with pytest.raises(NumericsError, match="uint8"):
        pack_e5m6(torch.ones(3, 3, dtype=torch.uint8))
    with pytest.raises(NumericsError, match="expected groups of 3 rows in all, got 4"):
        columns_of_packed(pack_e5m6(torch.ones(3, 3)), groups_of([4]))
