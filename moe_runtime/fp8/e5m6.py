"""E5M6: twelve bits a value, for the cached input of the linear after attention. Ref: DSV3 §3.3.3.

That linear's input is also what attention's backward starts from, so the report keeps it finer than E4M3.

    code       s eeeee mmmmmm             bias 15; subnormals; finite to 65024, quantum 2^-20
    FP16       s eeeee mmmmmm 0000        so a code moved up by four bits is FP16's number
    tile       1 x 128 values, one scale  the smallest power of two >= amax / 65024, amax at least 2^-90
    row        k bytes of the upper eight bits of each code, then the lower four, two to a byte:
               values 2i | 2i + 1 << 4, the last alone where k is odd: 3k/2 bytes, rounded up

Planes rather than three bytes in a row for two values: both a processor and a GPU then read whole vectors.

Rounding is to nearest, ties to even. Adding 2^(e + 17) to a magnitude of exponent e leaves exactly six
mantissa bits above FP32's last place, so the sum, taken as an integer, holds the rounded quanta; below
2^-14 the exponent stays, which makes the subnormals. A carry runs into the exponent field as it should.

Error of an element: at most 2^-7 of it, at least 2^-21 of the scale, that is 2^-36 of the tile's amax.

Special values, as in E4M3's tiles. Zeros keep their signs. With the floor of amax nothing is ever a subnormal
of FP32. Nothing finite exceeds 65024 x scale, so nothing saturates; what rounds up to 2^128 comes back
infinite. Infinity or NaN anywhere in a tile: the scale is NaN, all codes are 0x7FF, the tile comes back NaN.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from moe_comm.wire.formats import FP32_MAGNITUDE, FP32_MANTISSA_BITS
from torch import Tensor

from moe_runtime.errors import NumericsError
from moe_runtime.fp8 import cast_cpu
from moe_runtime.fp8.scales import ScaleLaw
from moe_runtime.fp8.tiled import TILE, Groups, Tiles, num_tiles

MAX = 65024.0
FLOOR = 2.0**-90
NAN_CODE = 0x7FF
_MANTISSA_BITS = 6
_SMALLEST_NORMAL = 127 - 14  # as FP32's exponent field
_SCALES = ScaleLaw(MAX, FLOOR, NAN_CODE)
_CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True, eq=False)
class Packed:
    """A matrix in E5M6 with one scale per 1 x 128; value = code x scale.

    Args:
        data: uint8 [rows, 3 x columns / 2 rounded up], the two planes of each row.
        scales: float32 [rows, num_tiles(columns)], powers of two or NaN.
        columns: values of a row.
    """

    data: Tensor
    scales: Tensor
    columns: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.data.shape[0], self.columns))

    @property
    def nbytes(self) -> int:
        """Bytes that are kept for it."""
        return self.data.nbytes + self.scales.nbytes


@torch.no_grad()
def pack_e5m6(x: Tensor) -> Packed:
    """Pack x [m, k] of any floating dtype of 16 to 64 bits; FP64 is rounded to FP32 first.

    Raises:
        NumericsError: not two axes, or not a floating dtype.
    """
    if x.dim() != 2 or not x.is_floating_point() or x.element_size() < 2:
        raise NumericsError(
            "E5M6: expected values [rows, columns] of a floating dtype of 16 to 64 bits, "
            f"got {list(x.shape)} of {x.dtype}"
        )
    if x.is_cuda:
        packed: Packed = _kernels().pack_e5m6_on_device(x)
        return packed
    rows, columns = x.shape
    data = torch.empty(rows, packed_width(columns), dtype=torch.uint8, device=x.device)
    scales = torch.empty(rows, num_tiles(columns), device=x.device)
    for part in _row_chunks(rows, columns):
        codes, scales[part] = _encode(x[part].float())
        _write_planes(codes, data[part])
    return Packed(data, scales, columns)


@torch.no_grad()
def unpack_e5m6(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values [m, k]; code x scale in FP32, then rounded to dtype (BF16: exact)."""
    if packed.data.is_cuda:
        on_device: Tensor = _kernels().unpack_e5m6_on_device(packed, dtype)
        return on_device
    rows, columns = packed.shape
    values = torch.empty(rows, columns, dtype=dtype, device=packed.data.device)
    for part in _row_chunks(rows, columns):
        values[part] = _decode(packed, part)
    return values


@torch.no_grad()
def columns_of_packed(packed: Packed, groups: Groups | None = None) -> Tiles:
    """Tiles [k, padded m] in E4M3 of the transposed matrix: `cast_columns` of the unpacked values.

    Raises:
        NumericsError: the groups have another number of rows.
    """
    rows, columns = packed.shape
    groups = Groups.one(rows, packed.data.device) if groups is None else groups
    if groups.num_rows != rows:
        raise NumericsError(f"E5M6 retiling: expected groups of {rows} rows in all, got {groups.num_rows}")
    if packed.data.is_cuda:
        tiles: Tiles = _kernels().columns_of_packed_on_device(packed, groups)
        return tiles
    made = cast_cpu.Columns(columns, groups)
    for chunk in cast_cpu.chunks(groups, columns):
        made.write(chunk.padded, _decode(packed, chunk.rows))
    return made.done()


def _kernels() -> ModuleType:
    """The Triton form, imported when it is first needed."""
    from moe_runtime.fp8 import e5m6_triton

    return e5m6_triton


def packed_width(columns: int) -> int:
    """Bytes of a row of that many values."""
    return columns + (columns + 1) // 2


def _row_chunks(rows: int, columns: int) -> list[slice]:
    """Rows that fit the cache, none where there is nothing to read."""
    if not columns:
        return []
    size = max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // columns)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _encode(values: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int32 [rows, columns], scales [rows, tiles]) of float32 values."""
    codes = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    scales = torch.empty(values.shape[0], num_tiles(values.shape[1]), device=values.device)
    for first, last in _segments(values.shape[1]):
        part = _in_tiles(values[:, first:last])
        made = _SCALES.of((part.view(torch.int32) & FP32_MAGNITUDE).amax(-1))
        its_codes = round_to_codes(part * made.inverses.unsqueeze(-1))
        if made.is_poisoned.any():
            its_codes.masked_fill_(made.is_poisoned.unsqueeze(-1), NAN_CODE)
        _in_tiles(codes[:, first:last]).copy_(its_codes)
        scales[:, first // TILE : num_tiles(last)] = made.scales
    return codes, scales


def round_to_codes(scaled: Tensor) -> Tensor:
    """int32 codes of float32 numbers of magnitude up to MAX: nearest, ties to even."""
    bits = scaled.view(torch.int32)
    magnitude = bits & FP32_MAGNITUDE
    exponents = (magnitude >> FP32_MANTISSA_BITS).clamp_(min=_SMALLEST_NORMAL)
    anchors = (exponents + (FP32_MANTISSA_BITS - _MANTISSA_BITS)).bitwise_left_shift_(FP32_MANTISSA_BITS)
    magnitude.view(torch.float32).add_(anchors.view(torch.float32))
    quanta = magnitude.sub_(anchors)
    codes = exponents.sub_(_SMALLEST_NORMAL).bitwise_left_shift_(_MANTISSA_BITS).add_(quanta)
    return codes.bitwise_or_((bits >> 20).bitwise_and_(0x800))


def _segments(columns: int) -> list[tuple[int, int]]:
    """(first, last) column of the whole tiles together, then of a short last one."""
    whole = columns // TILE * TILE
    return [span for span in ((0, whole), (whole, columns)) if span[0] < span[1]]


def _in_tiles(matrix: Tensor) -> Tensor:
    """A segment [rows, columns] as a view [rows, tiles, columns of a tile]."""
    return matrix.unflatten(1, (-1, min(matrix.shape[1], TILE)))


def _write_planes(codes: Tensor, data: Tensor) -> None:
    """Codes int32 [rows, columns] into data uint8 [rows, bytes]."""
    columns = codes.shape[1]
    data[:, :columns] = codes >> 4
    narrow = torch.zeros(codes.shape[0], columns + columns % 2, dtype=torch.int16, device=codes.device)
    narrow[:, :columns] = codes
    # A word is two codes; its low byte becomes the low four bits of both.
    pairs = narrow.view(torch.int32)
    data[:, columns:] = (pairs & 0xF).bitwise_or_((pairs >> 12).bitwise_and_(0xF0))


def _decode(packed: Packed, rows: slice) -> Tensor:
    """float32 values of some rows."""
    columns = packed.columns
    data = packed.data[rows]
    nibbles = data[:, columns:].to(torch.int32)
    pairs = (nibbles << 4 & 0xF0).bitwise_or_((nibbles & 0xF0).bitwise_left_shift_(16))
    halves = pairs.view(torch.int16)[:, :columns]
    halves = (data[:, :columns].to(torch.int16) << 8).bitwise_or_(halves)
    values = halves.view(torch.float16).float()
    for first, last in _segments(columns):
        factors = packed.scales[rows, first // TILE : num_tiles(last)]
        _in_tiles(values[:, first:last]).mul_(factors.unsqueeze(-1))
    return values
