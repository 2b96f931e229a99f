"""Inputs that the tests of FP8 share."""

import math

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import Blocks, Groups, Tiles
from tests.unit.comm.wire_values import heavy_tailed, same_bits, special_tiles

CPU = torch.device("cpu")
# Idle groups first, last and between; one row; all in one; no rows; whole tiles; no multiple of 128, 4 or 2.
RAGGED = [[0, 131, 0, 1, 0], [133], [0, 0], [128, 256], [127, 129, 3]]


def groups_of(counts: list[int]) -> Groups:
    return Groups(torch.tensor(counts, dtype=torch.int64), CPU)


def same(ours: Tiles | Blocks, theirs: Tiles | Blocks) -> bool:
    """The same codes, and the same scales bit for bit."""
    return torch.equal(ours.codes, theirs.codes) and same_bits(ours.scales, theirs.scales)


def mixed(rows: int, columns: int, seed: int) -> Tensor:
    """Finite rows of all kinds: normal, heavy-tailed, zeros, minus zeros, tiny, huge."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[1::5] = heavy_tailed(rows, columns, seed)[1::5]
    finite = special_tiles(columns)[:12]
    for place in range(2, rows, 5):
        x[place] = finite[place % 12] if place % 3 else x[place] * 2.0 ** (place % 60 - 30)
    return x


def poisoned(x: Tensor) -> Tensor:
    """A copy with an infinity and a NaN in it."""
    x = x.clone()
    if x.numel():
        x[x.shape[0] // 2, x.shape[1] // 2] = math.nan
        x[-1, 0] = -math.inf
    return x
