"""The tile quantiser: rows to E4M3 with one scale per 128 columns, and back. The only one of the project.

    values   | 128 columns | 128 columns | tail |        a tile: 128 columns of one row, the last may be short
    codes    | 128 x E4M3  | 128 x E4M3  | E4M3 |        uint8, the bits of float8_e4m3fn
    scales   |      s      |      s      |  s   |        value = code x s

    amax     the largest magnitude of the tile, at least 2^-100
    fp32     s = amax x (1/448)                          code = round(x x (448 / amax))
    pow2     s = smallest power of two >= amax / 448     code = round(x / s), the product is exact
             kept as a byte, the exponent field that s has in FP32

All arithmetic is IEEE FP32, one rounding an operation; an element is rounded to nearest, ties to even,
and can at most reach 448, so nothing saturates but by a last place. One division a tile, not one an
element: the fastest form on a GPU, where an exact division costs ten operations.

Special values.
    zeros       scale of the floor, codes 0x00 or 0x80: they come back as zeros with their signs.
    tiny        below 2^-100 the scale stays, so values fade into E4M3's subnormals (quantum 2^-117.8 or
                2^-117) and to zero. Hence no scale, inverse or result is ever a subnormal of FP32, and a
                processor that flushes those gives the same bits.
    huge        up to the largest FP32: the scale is at most 2^119.2 or 2^120. What rounds up to 2^128 comes
                back infinite, as from BF16.
    infinite    or NaN anywhere in a tile: the scale is NaN (byte 255), all codes are 0x7F, the whole
                tile comes back as NaN. One such element makes the whole row of a product NaN anyway, and
                a scale can say it without a look at each element. In decoding only the scale is asked.
    FP64        is rounded to FP32 first (what exceeds FP32 is infinite there); BF16 and FP16 are exact.

Three forms give the same bits: this file on a CPU, `tile_triton.py` on a GPU, and the loops of
`tile_reference.py`, which the tests hold against both.

How the CPU form is fast. It works in chunks that stay in the second-level cache, four passes to
encode: bits of the magnitude, their maximum as integers, product, cast. torch's vectorised cast is half of
the time; it rounds exactly as `formats.py` does for magnitudes up to 464 (tested on every one of them).
torch's cast back, though, is ten times as slow as the way taken here: an E4M3 code with its exponent
moved to the place of FP16's is FP16's number for value / 256, subnormals included:

    E4M3          s eeee mmm
    as int16      s s..s s eeee mmm << 7
    FP16          s 0eeee mmm0000000                      clear one copy of the sign; the hardware widens it

Rejected: a table of 256 values (one gather an element), `vector_norm` for amax (over ten times as slow
as a maximum of integers), padding the tail to a whole tile (a copy of all rows).
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from moe_comm.errors import CommError, InputError, NumericsError
from moe_comm.wire.formats import E4M3, FP32_INFINITY, FP32_MAGNITUDE, FP32_MANTISSA_BITS

TILE = 128
ScaleKind = Literal["fp32", "pow2"]
FLOOR = 2.0**-100
NAN_SCALE_BYTE = 255
_MAX = E4M3.max_value
_FLOOR_BITS = (127 - 100) << FP32_MANTISSA_BITS
# Added to the bits of amax = m x 2^a, this carries into the exponent exactly when m > 1.75 = 448 / 2^8.
_OVER_MAX_MANTISSA = 0x1FFFFF
_HALF_SHIFT = 256.0  # FP16's bias is 8 more than E4M3's
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CHUNK_ELEMENTS = 1 << 17  # FP32 and int32 scratch of a chunk: 1 MiB; per thread


def num_tiles(columns: int) -> int:
    """Tiles of a row of that many columns; the last may be short."""
    return -(-columns // TILE)


@torch.no_grad()
def quantise_tiles(values: Tensor, scales: ScaleKind = "fp32") -> tuple[Tensor, Tensor]:
    """E4M3 codes and one scale per 1 x 128 tile.

    Args:
        values: [rows, columns] of a floating dtype of 16 to 64 bits; rows at any distance.
        scales: `fp32`, or `pow2` for powers of two in one byte.

    Returns:
        (codes uint8 [rows, columns], scales [rows, tiles]: float32, or uint8 for pow2).

    Raises:
        InputError: not two axes, or not a floating dtype.
        NumericsError: no such kind of scale.

    Ref: DSV3 §3.3.2
    """
    if values.dim() != 2 or values.dtype not in _DTYPES:
        raise InputError(
            "quantise: expected values [rows, columns] of a floating dtype of 16 to 64 bits, "
            f"got shape {list(values.shape)} of {values.dtype}"
        )
    if scales not in get_args(ScaleKind):
        raise NumericsError(f"quantise: expected scales {' or '.join(get_args(ScaleKind))}, got {scales!r}")
    values = _adjacent(values)
    if values.is_cuda:
        values = values.float() if values.dtype == torch.float64 else values
        on_device: tuple[Tensor, Tensor] = _kernels().quantise_on_device(values, scales == "pow2")
        return on_device
    rows, columns = values.shape
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=values.device)
    amax_bits = torch.empty((rows, num_tiles(columns)), dtype=torch.int32, device=values.device)
    for first, last in _segments(columns):
        tiles = slice(first // TILE, num_tiles(last))
        _quantise_segment(
            _in_tiles(values[:, first:last]), _in_tiles(codes[:, first:last]), amax_bits[:, tiles], scales
        )
    return codes, _scales_of(amax_bits, scales)


@torch.no_grad()
def dequantise_tiles(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes and scales; code x scale in FP32, then rounded to dtype.

    Args:
        codes: uint8 [rows, columns]; rows at any distance, columns adjacent.
        scales: float32 or uint8 [rows, tiles], as `quantise_tiles` gives them; likewise.
        dtype: floating, of 16 to 64 bits.

    Returns:
        [rows, columns] of dtype.

    Raises:
        InputError: shapes or dtypes are not those of codes and their scales.
    """
    _check_parts(codes, scales, dtype)
    if codes.is_cuda:
        narrow = torch.float32 if dtype == torch.float64 else dtype
        on_device: Tensor = _kernels().dequantise_on_device(_adjacent(codes), _adjacent(scales), narrow)
        return on_device.to(dtype)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if scales.dtype == torch.uint8:
        is_poisoned = scales == NAN_SCALE_BYTE
        bits = scales.to(torch.int32).bitwise_left_shift_(FP32_MANTISSA_BITS)
        scales = bits.view(torch.float32).masked_fill_(is_poisoned, torch.nan)
    for first, last in _segments(codes.shape[1]):
        factors = scales[:, first // TILE : num_tiles(last)].unsqueeze(-1)
        _dequantise_segment(_in_tiles(codes[:, first:last]), factors, _in_tiles(values[:, first:last]))
    return values


def _adjacent(matrix: Tensor) -> Tensor:
    """The matrix with the columns of a row side by side."""
    return matrix if matrix.shape[1] < 2 or matrix.stride(1) == 1 else matrix.contiguous()


def _kernels() -> ModuleType:
    """The Triton form, imported when it is first needed."""
    try:
        from moe_comm.wire import tile_triton
    except ImportError as error:
        raise CommError(
            "FP8 on a GPU: expected triton, which CUDA builds of torch bring along; "
            f"got {error}; install the extra 'gpu'"
        ) from error
    return tile_triton


def _check_parts(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> None:
    if codes.dim() != 2 or codes.dtype != torch.uint8:
        raise InputError(
            f"dequantise: expected uint8 codes [rows, columns], got {list(codes.shape)} of {codes.dtype}"
        )
    expected = [codes.shape[0], num_tiles(codes.shape[1])]
    if list(scales.shape) != expected or scales.dtype not in (torch.float32, torch.uint8):
        raise InputError(
            f"dequantise: expected scales {expected} of float32 or uint8, "
            f"got {list(scales.shape)} of {scales.dtype}"
        )
    if dtype not in _DTYPES:
        raise InputError(f"dequantise: expected a floating dtype of 16 to 64 bits, got {dtype}")


def _segments(columns: int) -> Iterator[tuple[int, int]]:
    """(first, last) column of the whole tiles together, then of a short last one."""
    whole = columns // TILE * TILE
    if whole:
        yield 0, whole
    if whole < columns:
        yield whole, columns


def _in_tiles(matrix: Tensor) -> Tensor:
    """A segment [rows, columns] as a view [rows, tiles, columns of a tile]."""
    width = min(matrix.shape[1], TILE)
    return matrix.unflatten(1, (matrix.shape[1] // width, width))


def _chunks(shape: torch.Size) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose elements fit the cache."""
    size = max(1, _CHUNK_ELEMENTS * torch.get_num_threads() // (shape[1] * shape[2]))
    for first in range(0, shape[0], size):
        yield first, min(first + size, shape[0])


def _quantise_segment(values: Tensor, codes: Tensor, amax_bits: Tensor, scales: ScaleKind) -> None:
    """Write codes [rows, tiles, width] and the bits of amax [rows, tiles]."""
    rounded = codes.view(torch.float8_e4m3fn)
    wide, magnitude = _scratch(values, torch.float32), _scratch(values, torch.int32)
    for first, last in _chunks(values.shape):
        product, bits = wide[: last - first], magnitude[: last - first]
        chunk = values[first:last]
        if chunk.dtype != torch.float32:
            chunk = product.copy_(chunk)
        torch.bitwise_and(chunk.view(torch.int32), FP32_MAGNITUDE, out=bits)
        amax_bits[first:last] = bits.amax(-1)
        inverses = _inverses_of(amax_bits[first:last], scales)
        torch.mul(chunk, inverses.unsqueeze(-1), out=product)
        rounded[first:last].copy_(product)
    is_poisoned = amax_bits >= FP32_INFINITY
    if is_poisoned.any():
        codes.masked_fill_(is_poisoned.unsqueeze(-1), E4M3.nan_code)


def _dequantise_segment(codes: Tensor, factors: Tensor, values: Tensor) -> None:
    """Write values [rows, tiles, width] of codes and float32 factors [rows, tiles, 1]."""
    raised = factors * _HALF_SHIFT
    # Only a tile that reaches the last octave of FP32 has a scale too large for that.
    is_early = not raised.isinf().any()
    factors = raised if is_early else factors
    signed = codes.view(torch.int8)
    wide, halves = _scratch(values, torch.float32), _scratch(values, torch.int16)
    for first, last in _chunks(values.shape):
        product, bits = wide[: last - first], halves[: last - first]
        bits.copy_(signed[first:last]).mul_(128).bitwise_and_(~0x4000)
        product.copy_(bits.view(torch.float16))
        if not is_early:
            product.mul_(_HALF_SHIFT)
        if values.dtype == torch.float32:
            torch.mul(product, factors[first:last], out=values[first:last])
        else:
            values[first:last].copy_(product.mul_(factors[first:last]))


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    rows = max((last - first for first, last in _chunks(like.shape)), default=0)
    return torch.empty((rows, *like.shape[1:]), dtype=dtype, device=like.device)


def _inverses_of(amax_bits: Tensor, scales: ScaleKind) -> Tensor:
    """What elements are multiplied by; of poisoned tiles anything."""
    floored = amax_bits.clamp(min=_FLOOR_BITS)
    if scales == "fp32":
        amax = floored.view(torch.float32)
        return torch.full_like(amax, _MAX).div_(amax)
    return (254 - _exponents_of(floored)).bitwise_left_shift_(FP32_MANTISSA_BITS).view(torch.float32)


def _scales_of(amax_bits: Tensor, scales: ScaleKind) -> Tensor:
    """The scales [rows, tiles] that travel."""
    is_poisoned = amax_bits >= FP32_INFINITY
    floored = amax_bits.clamp(min=_FLOOR_BITS)
    if scales == "fp32":
        return floored.view(torch.float32).mul(1 / _MAX).masked_fill_(is_poisoned, torch.nan)
    return _exponents_of(floored).masked_fill_(is_poisoned, NAN_SCALE_BYTE).to(torch.uint8)


def _exponents_of(floored: Tensor) -> Tensor:
    """Biased exponent of the smallest power of two >= amax / 448, from the bits of amax; fresh int32."""
    return (floored + _OVER_MAX_MANTISSA).bitwise_right_shift_(FP32_MANTISSA_BITS).sub_(8)
