"""Inputs that the tests of the wire share: random, heavy-tailed, ragged, and every special value."""

import math

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max


def random_bits(rows: int, columns: int, seed: int) -> Tensor:
    """Any FP32 bit pattern, hence infinities, NaN and subnormals too."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (rows, columns), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def heavy_tailed(rows: int, columns: int, seed: int, spread: float = 4.0) -> Tensor:
    """Lognormal magnitudes of both signs: a few elements hold most of the sum."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, columns, generator=generator)
        .mul(spread)
        .exp()
        .mul(torch.randn(rows, columns, generator=generator).sign())
    )


def special_tiles(columns: int) -> Tensor:
    """One row for each special case of a tile; finite but for the last three."""
    ramp = torch.linspace(-1, 1, columns)
    tiny = torch.finfo(torch.float32).tiny
    rows = [
        torch.zeros(columns),
        torch.full((columns,), -0.0),
        ramp * LARGEST,
        torch.full((columns,), LARGEST),
        ramp * tiny,
        torch.full((columns,), 2.0**-149),
        ramp * 2.0**-100,
        ramp * 2.0**-99 + 2.0**-149,
        torch.full((columns,), 448.0),
        torch.full((columns,), math.nextafter(448.0, math.inf)),
        ramp * 448 * (1 + 2.0**-23),
        torch.where(torch.arange(columns) % 2 == 0, LARGEST, 1e-40),
        ramp.index_fill(0, torch.tensor([columns - 1]), math.inf),
        ramp.index_fill(0, torch.tensor([0]), -math.inf),
        ramp.index_fill(0, torch.tensor([columns // 2]), math.nan),
    ]
    return torch.stack(rows)


def on_ties(columns: int) -> Tensor:
    """Tiles with amax 448, so that a power-of-two scale is 1, full of midpoints between E4M3 values."""
    codes = torch.arange(127, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    points = torch.cat([points, -points])
    repeated = points.repeat(-(-8 * columns // points.numel()))[: 8 * columns].view(8, columns).clone()
    repeated[:, ::128] = 448.0
    return repeated


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    """Equal element by element, minus zero apart from zero, any NaN equal to any other."""
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    if not ours.is_floating_point():
        return torch.equal(ours, theirs)
    both_nan = ours.isnan() & theirs.isnan()
    equal = (ours == theirs) & (ours.signbit() == theirs.signbit())
    return bool((both_nan | equal).all())
