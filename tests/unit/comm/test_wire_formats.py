"""Formats against torch's casts, against exact arithmetic on all codes, and against chance."""

import math

import pytest
import torch
from moe_comm.errors import NumericsError
from moe_comm.wire.formats import E4M3, E5M2, UE5M3, Float8Format, decode, encode_nearest, encode_stochastic

FORMATS = [E4M3, E5M2, UE5M3]
TORCH_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def all_codes() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8)


def finite_values(fmt: Float8Format) -> torch.Tensor:
    """Non-negative finite values of the format in ascending order."""
    return decode(torch.arange(fmt.max_code + 1, dtype=torch.uint8), fmt)


def uniform_noise(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64).to(torch.int32)


def hard_inputs(fmt: Float8Format) -> torch.Tensor:
    """Every value, every midpoint, their FP32 neighbours on both sides, and both signs."""
    values = finite_values(fmt)
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    ups = torch.nextafter(points, torch.tensor(math.inf))
    downs = torch.nextafter(points, torch.tensor(-math.inf))
    return torch.cat([points, ups, downs, -points, -ups, -downs])


def nearest_by_search(values: torch.Tensor, fmt: Float8Format) -> torch.Tensor:
    """Slow oracle: the closest finite value in FP64; on a tie the even code. Magnitudes only."""
    grid = finite_values(fmt).double()
    distance = (values.double().unsqueeze(-1) - grid).abs()
    best = distance.min(dim=-1, keepdim=True).values
    codes = torch.arange(grid.numel())
    is_even_best = (distance == best) & (codes % 2 == 0)
    odd_choice = (distance == best).int().argmax(dim=-1)
    return torch.where(is_even_best.any(-1), is_even_best.int().argmax(dim=-1), odd_choice)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_decode_equals_torch_for_all_256_codes(fmt: Float8Format) -> None:
    theirs = all_codes().view(TORCH_DTYPES[fmt.name]).float()
    torch.testing.assert_close(decode(all_codes(), fmt), theirs, rtol=0, atol=0, equal_nan=True)


def test_unsigned_format_has_range_of_e5m2_and_steps_of_e4m3() -> None:
    values = finite_values(UE5M3)
    assert (values.diff() > 0).all()
    assert values[1] == 2.0**-17 and values[-1] == 1.75 * 2.0**16
    normal = values[8:]
    assert (normal.diff() / normal[:-1]).max() == 1 / 8
    assert decode(torch.tensor([255], dtype=torch.uint8), UE5M3).isnan().all()


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_nearest_returns_every_code_to_itself(fmt: Float8Format) -> None:
    codes = all_codes()
    values = decode(codes, fmt)
    number = ~values.isnan()
    assert torch.equal(encode_nearest(values, fmt)[number], codes[number])
    assert decode(encode_nearest(values, fmt)[~number], fmt).isnan().all()


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_nearest_equals_torch_cast_on_ties_their_neighbours_and_random_bits(fmt: Float8Format) -> None:
    values = torch.cat([hard_inputs(fmt), uniform_noise((1 << 20,)).view(torch.float32)])
    # torch overflows to NaN or infinity where we saturate; between max and that point both give max.
    values = values[(values.abs() <= fmt.max_value) | ~values.isfinite()]
    theirs = values.to(TORCH_DTYPES[fmt.name]).view(torch.uint8)
    ours = encode_nearest(values, fmt)
    number = ~values.isnan()
    assert torch.equal(ours[number & values.isfinite()], theirs[number & values.isfinite()])
    torch.testing.assert_close(
        decode(ours, fmt), theirs.view(TORCH_DTYPES[fmt.name]).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_nearest_equals_search_in_fp64(fmt: Float8Format) -> None:
    spread = torch.exp2(torch.linspace(fmt.smallest_exponent - 6, fmt.max_exponent + 3, 4001))
    values = torch.cat([hard_inputs(fmt).abs(), spread])
    assert torch.equal(encode_nearest(values, fmt).long(), nearest_by_search(values, fmt))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_finite_overflow_saturates_and_non_finite_never_becomes_a_number(fmt: Float8Format) -> None:
    noise = uniform_noise((5,))
    values = torch.tensor([fmt.max_value * 1.5, 3.4e38, math.inf, math.nan, -math.nan])
    for codes in (encode_nearest(values, fmt), encode_stochastic(values, fmt, noise)):
        back = decode(codes, fmt)
        assert (back[:2] == fmt.max_value).all()
        assert back[2] == math.inf if fmt.has_infinity else back[2].isnan()
        assert back[3:].isnan().all()


def test_negative_numbers_keep_their_sign_or_saturate_at_zero_without_one() -> None:
    values = torch.tensor([-0.0, -1e-30, -3.0, -math.inf])
    assert encode_nearest(values, E5M2).tolist() == [0x80, 0x80, 0xC2, 0xFC]
    assert encode_nearest(values, E4M3).tolist() == [0x80, 0x80, 0xC4, 0xFF]
    assert encode_nearest(values, UE5M3).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_stochastic_never_moves_a_value_of_the_format(fmt: Float8Format) -> None:
    values = decode(all_codes(), fmt)
    values = values[values.isfinite()]
    for extreme in (uniform_noise(values.shape), torch.full(values.shape, -1, dtype=torch.int32)):
        assert torch.equal(decode(encode_stochastic(values, fmt, extreme), fmt), values)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_stochastic_gives_a_neighbour_and_no_bias(fmt: Float8Format) -> None:
    """Normals, subnormals and values far below the smallest; the mean of n draws within 5 sigma."""
    exponents = torch.linspace(fmt.smallest_exponent - 5, fmt.max_exponent, 60)
    values = torch.exp2(exponents) * (1 if not fmt.is_signed else torch.tensor([1.0, -1.0]).repeat(30))
    draws = 20_000
    noise = uniform_noise((draws, values.numel()), seed=3)
    rounded = decode(encode_stochastic(values.expand(draws, -1).contiguous(), fmt, noise), fmt).double()
    grid = finite_values(fmt)
    upper_index = torch.searchsorted(grid, values.abs()).clamp(max=grid.numel() - 1)
    upper, lower = grid[upper_index].double(), grid[(upper_index - 1).clamp(min=0)].double()
    magnitude = values.abs().double()
    chance = (magnitude - lower) / (upper - lower).clamp(min=1e-300)
    assert ((rounded.abs() == upper) | (rounded.abs() == lower)).all()
    sigma = (upper - lower) * (chance * (1 - chance) / draws).clamp(min=0).sqrt()
    assert ((rounded.mean(0) - values).abs() <= 5 * sigma + 1e-12 * magnitude).all()


def test_wider_types_are_refused_rather_than_rounded_twice() -> None:
    with pytest.raises(NumericsError, match="expected float32, got torch"):
        encode_nearest(torch.ones(2, dtype=torch.float64), E4M3)
