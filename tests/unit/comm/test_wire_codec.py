"""Codecs: what they send, that it comes back, and how far off at most."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.errors import CommError
from moe_comm.wire import tile
from moe_comm.wire.codec import WIRES, WireCodec, open_wire, wire_pair
from moe_comm.wire.tile import num_tiles

from tests.unit.comm.wire_values import heavy_tailed, random_bits, same_bits, special_tiles

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HIDDEN = [1, 100, 128, 300]


def strided(parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The parts as fields of one record of bytes each, rows apart."""
    views = []
    for part in parts:
        record = torch.full((part.shape[0], part.shape[1] + 3), 7, dtype=part.dtype)
        record[:, 1 : part.shape[1] + 1] = part
        views.append(record[:, 1 : part.shape[1] + 1])
    return tuple(views)


def there_and_back(codec: WireCodec, rows: torch.Tensor) -> torch.Tensor:
    return codec.decode(strided(codec.encode(rows)), rows.dtype)


def rows_of(hidden: int) -> torch.Tensor:
    """Random, heavy-tailed, and zeros: finite, far from overflow."""
    generator = torch.Generator().manual_seed(hidden)
    rows = torch.cat(
        [torch.randn(4, hidden, generator=generator), heavy_tailed(4, hidden, seed=hidden, spread=2)]
    )
    rows[2] = 0
    rows[:, -(hidden // 3) :] *= torch.tensor([1.0, 0.0]).repeat(4).unsqueeze(1)
    return rows.clamp(-6e4, 6e4)


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("num_rows", [0, 3])
def test_fields_announce_what_encode_gives(name: str, dtype: torch.dtype, hidden: int, num_rows: int) -> None:
    codec = open_wire(name)
    parts = codec.encode(torch.ones(num_rows, hidden, dtype=dtype))
    assert [(part.shape, part.dtype) for part in parts] == [
        ((num_rows, columns), kind) for columns, kind in codec.fields(hidden, dtype)
    ]
    decoded = codec.decode(strided(parts), dtype)
    assert torch.equal(decoded, torch.ones(num_rows, hidden, dtype=dtype))
    assert codec.name == name


def test_bytes_of_a_row_are_those_of_the_table() -> None:
    def row_bytes(name: str) -> int:
        return sum(columns * kind.itemsize for columns, kind in open_wire(name).fields(7168, torch.bfloat16))

    assert [row_bytes(name) for name in WIRES] == [14336, 14336, 28672, 7168 + 56 * 4, 7168 + 56]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_is_bitwise_exact_and_never_copies(dtype: torch.dtype) -> None:
    bits = random_bits(6, 300, seed=1).view(torch.int32)
    rows = bits.view(torch.float32).to(dtype) if dtype == torch.float64 else bits.view(dtype)
    codec = open_wire("auto")
    (part,) = codec.encode(rows)
    decoded = codec.decode((part,), dtype)
    assert part.data_ptr() == decoded.data_ptr() == rows.data_ptr()
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(there_and_back(codec, rows).view(integers), rows.view(integers))


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_rows_already_of_the_wire_are_not_copied(name: str, dtype: torch.dtype) -> None:
    rows = torch.randn(4, 300).to(dtype)
    (part,) = open_wire(name).encode(rows)
    assert part.data_ptr() == rows.data_ptr()


def test_narrower_dtypes_pass_through_fp32_unchanged() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        rows = random_bits(6, 300, seed=2).to(dtype)
        assert same_bits(there_and_back(open_wire("fp32"), rows), rows)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_bf16_and_fp32_stay_within_their_bounds(hidden: int, dtype: torch.dtype) -> None:
    rows = rows_of(hidden).to(dtype)
    if dtype == torch.float64:
        rows = rows * (1 + 2.0**-27)
    for name, relative, smallest in (("bf16", 2.0**-8 * 1.01, 2.0**-134), ("fp32", 2.0**-24, 2.0**-150)):
        error = (there_and_back(open_wire(name), rows).double() - rows.double()).abs()
        assert (error <= rows.double().abs() * relative + smallest).all()


def fp8_bound(rows: torch.Tensor, name: str) -> torch.Tensor:
    """2^-4 |x|, at least 2^-18.8 (or 2^-17.8) of the tile's amax: the table of the codec's essay, in FP64."""
    padded = torch.nn.functional.pad(rows.double().abs(), (0, -rows.shape[1] % 128))
    amax = padded.unflatten(1, (-1, 128)).amax(-1).clamp(min=2.0**-100)
    share = 2.0**-10 / 448 if name == "fp8" else 2.0**-10 / 224
    smallest = (amax * share).repeat_interleave(128, 1)[:, : rows.shape[1]]
    return torch.maximum(rows.double().abs() * 2.0**-4, smallest) + rows.double().abs() * 2.0**-21


@pytest.mark.parametrize("name", ["fp8", "fp8_pow2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [*HIDDEN, 1024])
def test_fp8_stays_within_its_bound(name: str, dtype: torch.dtype, hidden: int) -> None:
    rows = rows_of(hidden).to(dtype)
    error = (there_and_back(open_wire(name), rows).double() - rows.double()).abs()
    # Decoding to a narrow dtype rounds once more: 2^-8 of BF16, 2^-11 of FP16 and its subnormals.
    last = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}.get(dtype, 0.0) * rows.double().abs() * 1.07
    assert (error <= fp8_bound(rows, name) + last + (2.0**-25 if dtype == torch.float16 else 0)).all()
    assert (there_and_back(open_wire(name), rows)[rows == 0] == 0).all()


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=200),
    name=st.sampled_from(["fp8", "fp8_pow2"]),
)
def test_fp8_bound_holds_for_any_numbers(numbers: list[float], name: str) -> None:
    rows = torch.tensor([numbers])
    error = (there_and_back(open_wire(name), rows).double() - rows.double()).abs()
    assert (error <= fp8_bound(rows, name)).all()


def test_the_bound_is_tight_enough_to_see_a_fault() -> None:
    """Half of E4M3's mantissa lost, or scales of the wrong rows, are outside of it."""
    rows = heavy_tailed(8, 300, seed=1)
    codec = open_wire("fp8")
    codes, scales = codec.encode(rows)
    for parts in ((codes & 0xFE, scales), (codes, scales.roll(1, 0))):
        error = (codec.decode(parts, torch.float32).double() - rows.double()).abs()
        assert (error > fp8_bound(rows, "fp8")).any()


@pytest.mark.parametrize("name", ["fp8", "fp8_pow2"])
def test_what_is_not_finite_poisons_its_tile_and_no_other(name: str) -> None:
    rows = torch.ones(3, 300)
    rows[1, 130], rows[2, 299] = float("inf"), float("nan")
    wanted = torch.zeros(3, 300, dtype=torch.bool)
    wanted[1, 128:256] = wanted[2, 256:] = True
    assert torch.equal(there_and_back(open_wire(name), rows).isnan(), wanted)


@pytest.mark.parametrize("name", WIRES)
def test_rows_with_history_are_encoded_without_it(name: str) -> None:
    rows = torch.ones(2, 300, requires_grad=True)
    with torch.no_grad():
        assert not there_and_back(open_wire(name), rows).requires_grad


def test_special_tiles_do_not_disturb_their_neighbours() -> None:
    ordinary = torch.randn(1, 128).expand(special_tiles(128).shape[0], -1)
    rows = torch.cat([special_tiles(128), ordinary, special_tiles(44)], 1)
    for name in ("fp8", "fp8_pow2"):
        alone = there_and_back(open_wire(name), ordinary)
        assert torch.equal(there_and_back(open_wire(name), rows)[:, 128:256], alone)


def test_fp8_dispatch_is_paired_with_bf16_combine() -> None:
    names = {name: tuple(codec.name for codec in wire_pair(name)) for name in WIRES}
    assert names == {
        "auto": ("auto", "auto"),
        "bf16": ("bf16", "bf16"),
        "fp32": ("fp32", "fp32"),
        "fp8": ("fp8", "bf16"),
        "fp8_pow2": ("fp8_pow2", "bf16"),
    }


def test_an_unknown_wire_is_named_with_what_there_is() -> None:
    for opener in (open_wire, wire_pair):
        with pytest.raises(CommError, match="expected one of auto, bf16, fp32, fp8, fp8_pow2, got 'int8'"):
            opener("int8")


def test_a_fields_tile_count_covers_the_row() -> None:
    assert [num_tiles(columns) for columns in (0, 1, 128, 129, 7168)] == [0, 1, 1, 2, 56]


def test_a_cpu_needs_no_triton_and_a_gpu_without_it_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "moe_comm.wire.tile_triton", raising=False)
    monkeypatch.delattr("moe_comm.wire.tile_triton", raising=False)
    for name in WIRES:
        assert torch.equal(there_and_back(open_wire(name), torch.ones(2, 300)), torch.ones(2, 300))
    with pytest.raises(CommError, match=r"FP8 on a GPU: expected triton.*install the extra 'gpu'"):
        tile._kernels()
