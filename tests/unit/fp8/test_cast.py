"""Casts to tiles on a CPU: against the fractions of the reference, along both axes; retiling, its error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.wire.tile import quantise_tiles

from moe_runtime.errors import NumericsError
from moe_runtime.fp8 import cast_cpu
from moe_runtime.fp8.cast import cast_both, cast_columns, cast_normed, cast_rows, columns_of, decode
from moe_runtime.fp8.cast_reference import (
    reference_columns,
    reference_columns_of,
    reference_decode,
    reference_rows,
)
from moe_runtime.fp8.difference import sqnr_db
from moe_runtime.fp8.tiled import TILE, Groups, Tiles
from tests.unit.comm.wire_values import on_ties, random_bits, same_bits, special_tiles
from tests.unit.fp8.fp8_values import RAGGED, groups_of, mixed, poisoned, same


def spread(tiles: Tiles) -> torch.Tensor:
    """The scale of each element."""
    return tiles.scales.repeat_interleave(TILE, 1)[:, : tiles.shape[1]]


def unpadded(columns: Tiles, groups: Groups) -> torch.Tensor:
    """Values [tokens, features] without the gaps."""
    values, parts, start = decode(columns).t(), [], 0
    for count, room in zip(groups.counts.tolist(), groups.padded_counts.tolist(), strict=True):
        parts.append(values[start : start + count])
        start += room
    return torch.cat(parts)


@pytest.mark.parametrize("columns", [1, 127, 128, 300])
def test_rows_are_cast_as_the_reference_casts_them(columns: int) -> None:
    for x in (mixed(11, columns, 0), special_tiles(columns), random_bits(5, columns, 1), on_ties(columns)):
        tiles = cast_rows(x)
        assert same(tiles, reference_rows(x))
        assert same_bits(decode(tiles), reference_decode(tiles))
        assert same(cast_rows(x.bfloat16()), reference_rows(x.bfloat16()))


def test_scales_of_the_other_kind_are_those_of_the_wire() -> None:
    x = special_tiles(300)
    codes, scales = quantise_tiles(x, "fp32")
    assert same(cast_rows(x, "fp32"), Tiles(codes, scales))


@pytest.mark.parametrize("counts", RAGGED, ids=str)
@pytest.mark.parametrize("features", [1, 6])
def test_columns_of_ragged_groups_are_cast_as_the_reference_casts_them(
    counts: list[int], features: int
) -> None:
    groups = groups_of(counts)
    for x in (mixed(sum(counts), features, 2), poisoned(mixed(sum(counts), features, 3)).bfloat16()):
        wanted = reference_columns(x, groups)
        assert same(cast_columns(x, groups), wanted)
        rows, columns = cast_both(x, groups)
        assert same(columns, wanted) and same(rows, cast_rows(x))


@pytest.mark.parametrize("counts", RAGGED, ids=str)
def test_retiling_is_what_the_reference_says(counts: list[int]) -> None:
    groups = groups_of(counts)
    for x in (mixed(sum(counts), 5, 4), poisoned(mixed(sum(counts), 5, 5))):
        tiles = cast_rows(x)
        retiled = columns_of(tiles, groups)
        assert same(retiled, reference_columns_of(tiles, groups))
        assert same(retiled, cast_columns(decode(tiles), groups))


def test_without_groups_all_rows_are_one() -> None:
    x = mixed(200, 130, 6)
    one = groups_of([200])
    assert same(cast_columns(x), cast_columns(x, one))
    assert same(cast_both(x)[1], cast_columns(x, one))
    assert same(columns_of(cast_rows(x)), columns_of(cast_rows(x), one))


def test_any_bits_are_retiled_as_they_are_cast() -> None:
    x = random_bits(140, 130, 7)
    # Half of the tiles have something not finite otherwise.
    x = torch.where(x.isfinite() | (torch.arange(140) % 50 == 3).unsqueeze(1), x, 1.0)
    tiles = cast_rows(x)
    assert same(columns_of(tiles), cast_columns(decode(tiles)))


def test_a_row_of_nan_poisons_the_columns_that_it_crosses_and_no_others() -> None:
    x = torch.randn(300, 256, generator=torch.Generator().manual_seed(0))
    x[5, 130] = math.nan
    groups = groups_of([100, 200])
    values = decode(columns_of(cast_rows(x), groups))
    assert values[128:, :128].isnan().all()
    assert not values[:128].isnan().any() and not values[:, 128:].isnan().any()
    assert (values[:128, 100:128] == 0).all()
    assert (cast_columns(x, groups).codes[:, 128 + 200 :] == 0).all()
    assert (cast_columns(x, groups).codes[:, 100:128] == 0).all()


@settings(max_examples=30, deadline=None)
@given(spread_of_rows=st.floats(0, 12), rows=st.integers(1, 300), seed=st.integers(0, 1000))
def test_retiling_shifts_exactly_but_into_subnormals(spread_of_rows: float, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 130, generator=generator)
    x *= torch.randn(rows, 1, generator=generator).mul(spread_of_rows).exp2()
    tiles, groups = cast_rows(x), groups_of([rows // 3, 0, rows - rows // 3])
    retiled = columns_of(tiles, groups)
    before = decode(tiles)
    # What each element of the rows met as its new scale.
    new_scales = unpadded(Tiles(torch.full_like(retiled.codes, 0x38), retiled.scales), groups)
    after = unpadded(retiled, groups)
    is_normal = before.abs() >= new_scales * 2.0**-6
    assert torch.equal(before[is_normal], after[is_normal])
    assert ((before - after).abs() <= new_scales * 2.0**-10).all()
    largest = spread(tiles).amax(0)
    assert (new_scales <= largest).all()


@pytest.mark.parametrize(("spread_of_rows", "lost_db"), [(0.0, 0.01), (2.0, 0.1), (4.0, 0.5)])
def test_the_extra_error_of_retiling_is_small(spread_of_rows: float, lost_db: float) -> None:
    """Against columns cast from the values themselves, rows of magnitudes spread by powers of two."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(512, 384, generator=generator)
    x *= torch.randn(512, 1, generator=generator).mul(spread_of_rows).exp2()
    groups = groups_of([512])
    direct = sqnr_db(x, unpadded(cast_columns(x, groups), groups))
    retiled = sqnr_db(x, unpadded(columns_of(cast_rows(x), groups), groups))
    assert direct > 30 and retiled > direct - lost_db


@pytest.mark.parametrize("threads", [1, 2])
def test_chunks_and_threads_do_not_show(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, groups = poisoned(mixed(700, 150, 8)), groups_of([300, 0, 400])
    whole = [*cast_both(x, groups), columns_of(cast_rows(x), groups)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    monkeypatch.setattr(cast_cpu, "_CHUNK_ELEMENTS", 1000)
    again = [*cast_both(x, groups), columns_of(cast_rows(x), groups)]
    torch.set_num_threads(before)
    assert all(same(*pair) for pair in zip(whole, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_norm_and_its_cast_are_the_norm_and_the_cast_of_its_output(dtype: torch.dtype) -> None:
    x = mixed(40, 300, 9).clamp(-1e15, 1e15).to(dtype)
    gain = torch.rand(300, generator=torch.Generator().manual_seed(0)) + 0.5
    out, rstd, tiles = cast_normed(x, gain, 1e-6)
    assert out.dtype == dtype and rstd.dtype == torch.float32
    assert same(tiles, cast_rows(out))
    exact = x.double()
    wanted_rstd = (exact.square().mean(-1) + 1e-6).rsqrt()
    torch.testing.assert_close(rstd.double(), wanted_rstd, rtol=1e-6, atol=0)
    wanted = exact * wanted_rstd.unsqueeze(1) * gain.double()
    torch.testing.assert_close(
        out.double(), wanted, rtol=2e-6 if dtype == torch.float32 else 2.0**-8, atol=1e-30
    )


def test_mistakes_are_named() -> None:
    x = torch.ones(4, 128)
    with pytest.raises(NumericsError, match="expected groups of 4 rows in all, got 5"):
        cast_columns(x, groups_of([2, 3]))
    with pytest.raises(NumericsError, match="powers of two"):
        columns_of(cast_rows(x * 3, "fp32"))
