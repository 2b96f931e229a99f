"""Casts to tiles on a CPU: the forms behind `cast.py`. Each works in chunks of rows that fit the cache."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from moe_comm.wire.formats import E4M3, FP32_MAGNITUDE, FP32_MANTISSA_BITS
from moe_comm.wire.tile import NAN_SCALE_BYTE, ScaleKind, dequantise_tiles, quantise_tiles
from torch import Tensor

from moe_runtime.fp8.scales import E4M3_SCALES
from moe_runtime.fp8.tiled import TILE, Groups, Tiles

_CHUNK_ELEMENTS = 1 << 17  # float32 and int32 of a chunk: 1 MiB; per thread


def float_scales(scales: Tensor) -> Tensor:
    """Scales as float32: bytes are biased exponents, 255 is NaN; float32 as it is."""
    if scales.dtype == torch.float32:
        return scales
    bits = scales.to(torch.int32).bitwise_left_shift_(FP32_MANTISSA_BITS)
    return bits.view(torch.float32).masked_fill_(scales == NAN_SCALE_BYTE, torch.nan)


def are_powers_of_two(scales: Tensor) -> bool:
    """True if all scales are powers of two or NaN."""
    mantissas = scales.contiguous().view(torch.int32).bitwise_and((1 << FP32_MANTISSA_BITS) - 1)
    return not bool(((mantissas != 0) & ~scales.isnan()).any())


def quantise_rows(x: Tensor, scales: ScaleKind = "pow2") -> Tiles:
    """x [rows, columns] in tiles along the columns."""
    codes, made = quantise_tiles(x, scales)
    return Tiles(codes, float_scales(made))


class Columns:
    """Tiles [features, padded tokens] in the making: chunks of tokens are written one after the other.

    Args:
        features: rows of the result.
        groups: how tokens are shared out; gaps keep the code 0.
    """

    def __init__(self, features: int, groups: Groups) -> None:
        self._codes = torch.zeros(features, groups.num_padded, dtype=torch.uint8)
        # One row a token tile: a chunk writes adjacent scales.
        self._scales = torch.empty(groups.num_padded // TILE, features)

    def write(self, padded: int, values: Tensor) -> None:
        """Cast values [tokens, features] whose first token stands at `padded`, a multiple of 128."""
        values = values.float()
        whole = values.shape[0] // TILE * TILE
        if whole:
            self._write_tiles(padded, values[:whole].unflatten(0, (-1, TILE)))
        if whole < values.shape[0]:
            self._write_tiles(padded + whole, values[whole:].unsqueeze(0))

    def _write_tiles(self, padded: int, values: Tensor) -> None:
        """Cast values float32 [tiles, tokens of each, features]; what is short of 128 tokens is gap."""
        tiles, tokens, features = values.shape
        amax_bits = (values.view(torch.int32) & FP32_MAGNITUDE).amax(1)
        made = E4M3_SCALES.of(amax_bits)
        codes = (values * made.inverses.unsqueeze(1)).to(torch.float8_e4m3fn).view(torch.uint8)
        if made.is_poisoned.any():
            codes.masked_fill_(made.is_poisoned.unsqueeze(1), E4M3.nan_code)
        place = slice(padded, padded + tiles * tokens)
        # Bytes are turned in a buffer of their own: a copy straight to its place would not be blocked.
        self._codes[:, place] = codes.view(tiles * tokens, features).t().contiguous()
        self._scales[padded // TILE : padded // TILE + tiles] = made.scales

    def done(self) -> Tiles:
        """What was written; the scales are a transposed view."""
        return Tiles(self._codes, self._scales.t())


class Chunk(NamedTuple):
    """Rows of one group that are handled at once, and where their first token stands when padded."""

    rows: slice
    padded: int


def chunks(groups: Groups, columns: int) -> Iterator[Chunk]:
    """All rows, a multiple of 128 of one group at a time but for the group's last."""
    size = max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // max(columns, 1) // TILE) * TILE
    start = padded = 0
    counts = zip(groups.counts.tolist(), groups.padded_counts.tolist(), strict=True)
    for count, room in counts:
        for first in range(0, count, size):
            yield Chunk(slice(start + first, start + min(first + size, count)), padded + first)
        start, padded = start + count, padded + room


def values_of(tiles: Tiles, rows: slice) -> Tensor:
    """float32 values of some rows."""
    return dequantise_tiles(tiles.codes[rows], tiles.scales[rows])


def cast_columns(x: Tensor, groups: Groups) -> Tiles:
    """See `cast.cast_columns`."""
    columns = Columns(x.shape[1], groups)
    for chunk in chunks(groups, x.shape[1]):
        columns.write(chunk.padded, x[chunk.rows])
    return columns.done()


def cast_both(x: Tensor, groups: Groups) -> tuple[Tiles, Tiles]:
    """See `cast.cast_both`."""
    return quantise_rows(x), cast_columns(x, groups)


def columns_of(tiles: Tiles, groups: Groups) -> Tiles:
    """See `cast.columns_of`."""
    columns = Columns(tiles.shape[1], groups)
    for chunk in chunks(groups, tiles.shape[1]):
        columns.write(chunk.padded, values_of(tiles, chunk.rows))
    return columns.done()


def cast_normed(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tiles]:
    """See `cast.cast_normed`."""
    out, rstd = torch.empty_like(x), torch.empty(x.shape[0])
    gain = gain.float()
    for chunk in chunks(Groups.one(x.shape[0], x.device), x.shape[1]):
        high = x[chunk.rows].float()
        its_rstd = torch.square(high).mean(-1).add_(eps).rsqrt_()
        rstd[chunk.rows] = its_rstd
        out[chunk.rows] = torch.mul(high, its_rstd.unsqueeze(1)).mul_(gain)
    return out, rstd, quantise_rows(out)
