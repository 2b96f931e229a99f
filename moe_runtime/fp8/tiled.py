"""What FP8 operands look like: E4M3 codes with one scale per tile or block. Ref: DSV3 §3.3.2.

    Tiles     activations and gradients [rows, columns]    one scale per   1 x 128
    Blocks    weights [..., rows, columns]                 one scale per 128 x 128

Both are K-major: the axis that a product sums over is the last one and adjacent in memory, as Hopper's
FP8 units want it. A product over tokens (the weight gradient) therefore takes `Tiles` of transposed
matrices [features, tokens], which are the report's 128 x 1 tiles of the matrices themselves.

Rows of several experts lie one after the other, any number each (`Groups`). Where tokens are the summed
axis, each group's tokens begin at a multiple of 128, so that no tile holds tokens of two experts; the gap
is filled with zeros, which add nothing to a sum.

Scales are float32 whatever made them, the form that all matrix units take. Powers of two are the rule
here (`pow2`): then a tile can be cut anew along the other axis by adding to exponents, and a decoded value
is exact in BF16.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from moe_runtime.errors import NumericsError

TILE = 128


def num_tiles(length: int) -> int:
    """Tiles of an axis; the last may be short."""
    return -(-length // TILE)


@dataclass(frozen=True, eq=False)
class Tiles:
    """A matrix in 1 x 128 tiles; value = code x scale.

    Args:
        codes: uint8 [rows, columns], the bits of E4M3; columns adjacent.
        scales: float32 [rows, num_tiles(columns)], at any strides. Kernels on a GPU write them as
            [tiles, rows rounded up to 4] and give the transposed view, which is what FP8 units read best.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for it."""
        return self.codes.nbytes + self.scales.nbytes


@dataclass(frozen=True, eq=False)
class Blocks:
    """A matrix, or one for each expert, in 128 x 128 blocks; value = code x scale.

    Args:
        codes: uint8 [..., rows, columns], columns adjacent.
        scales: float32 [..., num_tiles(rows), num_tiles(columns)], contiguous.
    """

    codes: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for it."""
        return self.codes.nbytes + self.scales.nbytes

    def transposed(self) -> "Blocks":
        """The transposed matrix, its codes moved so that its columns are adjacent; the same values."""
        return Blocks(self.codes.transpose(-2, -1).contiguous(), self.scales.transpose(-2, -1).contiguous())


@dataclass(frozen=True, eq=False)
class Groups:
    """How rows are shared out to experts.

    Args:
        counts: int64 [groups] on the CPU, rows of each, in order; any may be zero.
        device: where `ends` and `padded_ends` live.
    """

    counts: Tensor
    device: torch.device

    def __post_init__(self) -> None:
        counts = self.counts
        fits = isinstance(counts, Tensor) and counts.dtype == torch.int64 and counts.dim() == 1
        if not fits or counts.is_cuda or bool((counts < 0).any()):
            raise NumericsError(
                f"FP8 groups: expected counts int64 [groups] on the CPU, none negative, got {counts!r}"
            )

    @cached_property
    def num_rows(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def padded_counts(self) -> Tensor:
        """int64 [groups] on the CPU: tokens of each group where tokens are the summed axis."""
        return (self.counts + TILE - 1) // TILE * TILE

    @cached_property
    def num_padded(self) -> int:
        return int(self.padded_counts.sum())

    @cached_property
    def ends(self) -> Tensor:
        """int32 [groups] on the device: where each group's rows end."""
        return self._put(self.counts.cumsum(0))

    @cached_property
    def padded_ends(self) -> Tensor:
        """int32 [groups] on the device: where each group's tokens end in the padded layout."""
        return self._put(self.padded_counts.cumsum(0))

    @cached_property
    def tile_rows(self) -> Tensor:
        """int32 [padded tiles, 2] on the device: the first row and the number of rows of each 128 tokens."""
        tiles = self.padded_counts // TILE
        group = torch.arange(tiles.numel()).repeat_interleave(tiles)
        within = (torch.arange(group.numel()) - (tiles.cumsum(0) - tiles)[group]) * TILE
        first = (self.counts.cumsum(0) - self.counts)[group] + within
        size = (self.counts[group] - within).clamp(max=TILE)
        return self._put(torch.stack((first, size), dim=1))

    def _put(self, numbers: Tensor) -> Tensor:
        """As int32 on the device; the host waits for no kernel."""
        return numbers.to(torch.int32).to(self.device, non_blocking=True)

    @staticmethod
    @lru_cache(maxsize=64)
    def one(rows: int, device: torch.device) -> "Groups":
        """All rows in one group; the same object again, for each linear asks for it."""
        return Groups(torch.tensor([rows]), device)
