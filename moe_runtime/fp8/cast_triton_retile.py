"""Tiles along the tokens from tiles along the features, on a GPU: the retile of a weight gradient.

Two bytes an element are all that moves, so at 4 TB/s there are 17 issue slots an element, and going through
FP32 took 14 of them: it ran at half of the copy's bandwidth. Scales are powers of two, so nearly always the
whole of it fits FP16, two elements an instruction:

    codes of 4 tokens x 4 columns, a word a token  ->  a word a column, by 8 byte permutations
    -> FP16 pairs x (row's scale / the largest scale of the block)    exact while that is >= 2^-15:
                                                                      a code's last bit is 2^-9, FP16's 2^-24
    -> amax of each column -> its new scale S
    -> x (largest scale / S) -> codes, rounded once                   exact while the factor is <= 2^15

Where a block breaks one of the two bounds (a row of zeros, whose scale is the floor, next to others; a
column of nothing but tiny values; a poisoned row), its program takes the way through FP32. The bits are
the same either way; the interpreter and older cards always go through FP32.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from moe_runtime.fp8.cast_triton_columns import as_words, decode_quarter, store_columns
from moe_runtime.fp8.cast_triton_tile import casts_in_hardware, empty_tiles, launch_options
from moe_runtime.fp8.tiled import TILE, Groups, Tiles

_TILE: tl.constexpr = tl.constexpr(TILE)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr((127 - 108) << 23)  # of a tile of zeros
_LOWEST_TOP: tl.constexpr = tl.constexpr((127 - 93) << 23)  # 2^-15 of it is no less than that
_LARGEST_SHIFT: tl.constexpr = tl.constexpr(15)
COLUMNS, WARPS = 64, 2


@triton.jit
def _by_columns(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor) -> Any:
    """Words of four columns, a token each, as words of four tokens, a column each."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, c, d;
        prmt.b32 a, $4, $5, 0x5140;
        prmt.b32 b, $6, $7, 0x5140;
        prmt.b32 c, $4, $5, 0x7362;
        prmt.b32 d, $6, $7, 0x7362;
        prmt.b32 $0, a, b, 0x5410;
        prmt.b32 $1, a, b, 0x7632;
        prmt.b32 $2, c, d, 0x5410;
        prmt.b32 $3, c, d, 0x7632;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r",
        [w0, w1, w2, w3],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _scaled_pairs(word: tl.tensor, first: tl.tensor, second: tl.tensor) -> Any:
    """FP16 pairs of a column's tokens (0, 1) and (2, 3) times their factors; the larger magnitudes."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        .reg .b16 x, y;
        mov.b32 {x, y}, $3;
        cvt.rn.f16x2.e4m3x2 a, x;
        cvt.rn.f16x2.e4m3x2 b, y;
        mul.rn.f16x2 $0, a, $4;
        mul.rn.f16x2 $1, b, $5;
        abs.f16x2 a, $0;
        abs.f16x2 b, $1;
        max.NaN.f16x2 $2, a, b;
        }""",
        "=&r,=&r,=&r,r,r,r",
        [word, first, second],
        dtype=(tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _amax_of_two(left: tl.tensor, right: tl.tensor) -> Any:
    """From a pair of magnitudes of each of two columns: the larger of each, in a pair."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        prmt.b32 a, $1, $2, 0x5410;
        prmt.b32 b, $1, $2, 0x7632;
        max.NaN.f16x2 $0, a, b;
        }""",
        "=r,r,r",
        [left, right],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _larger_pair(left: tl.tensor, right: tl.tensor) -> Any:
    return tl.inline_asm_elementwise(
        "max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _smaller_pair(left: tl.tensor, right: tl.tensor) -> Any:
    return tl.inline_asm_elementwise(
        "min.u16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _exponents(amax: tl.tensor) -> Any:
    """Of the amax of two columns, FP16 pairs, the exponents of their new scales.

    Returns:
        (exponents where FP16 keeps them, biased, that of 448 x a scale of 1 being 23, at least 8; the same
        without the bound, to see whether it mattered, with a column of zeros as 32). NaN counts as 0.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 e, z, k;
        mov.b32 k, 0x20002000;
        add.u32 e, $2, 0x00FF00FF;
        and.b32 e, e, 0x7C007C00;
        max.u16x2 $0, e, k;
        or.b32 z, $2, 0x80008000;
        sub.u32 z, z, 0x00010001;
        not.b32 z, z;
        and.b32 z, z, 0x80008000;
        or.b32 $1, e, z;
        }""",
        "=&r,=&r,r",
        [amax],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _encode_columns(p0: tl.tensor, q0: tl.tensor, p1: tl.tensor, q1: tl.tensor, exponents: tl.tensor) -> Any:
    """The codes of four tokens of two columns, an int32 each; exponents as `_exponents` gives them."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, b, f, g;
        .reg .b16 x, y;
        sub.u32 f, 0x98009800, $6;
        prmt.b32 g, f, f, 0x1010;
        mul.rn.f16x2 a, $2, g;
        mul.rn.f16x2 b, $3, g;
        cvt.rn.satfinite.e4m3x2.f16x2 x, a;
        cvt.rn.satfinite.e4m3x2.f16x2 y, b;
        mov.b32 $0, {x, y};
        prmt.b32 g, f, f, 0x3232;
        mul.rn.f16x2 a, $4, g;
        mul.rn.f16x2 b, $5, g;
        cvt.rn.satfinite.e4m3x2.f16x2 x, a;
        cvt.rn.satfinite.e4m3x2.f16x2 y, b;
        mov.b32 $1, {x, y};
        }""",
        "=&r,=&r,r,r,r,r,r",
        [p0, q0, p1, q1, exponents],
        dtype=(tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _pair(low: tl.tensor, high: tl.tensor) -> Any:
    """Two float32 as FP16 in one int32."""
    return tl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _scale_of(exponents: tl.tensor, amax: tl.tensor, top: tl.tensor, SHIFT: tl.constexpr) -> Any:
    """float32 scales of the columns at bit SHIFT; `top` the bits of the largest row scale."""
    exponent = (exponents >> (SHIFT + 10)) & 31
    bits = tl.where(((amax >> SHIFT) & 0xFFFF) == 0, _SMALLEST_SCALE, top + ((exponent - 23) << 23))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _larger_and_smaller(l0: tl.tensor, s0: tl.tensor, l1: tl.tensor, s1: tl.tensor) -> Any:
    return tl.maximum(l0, l1), tl.minimum(s0, s1)


@triton.jit
def _row_factors(row_scales: tl.tensor, row_scale_stride: tl.tensor, row: tl.tensor, count: tl.tensor) -> Any:
    """Scales of rows 4i .. 4i + 3 over the largest, as two FP16 pairs; bits of the largest and smallest."""
    at = row_scales + row * row_scale_stride
    s0 = tl.load(at, mask=row < count, other=0.0)
    s1 = tl.load(at + row_scale_stride, mask=row + 1 < count, other=0.0)
    s2 = tl.load(at + 2 * row_scale_stride, mask=row + 2 < count, other=0.0)
    s3 = tl.load(at + 3 * row_scale_stride, mask=row + 3 < count, other=0.0)
    b0, b1 = s0.to(tl.int32, bitcast=True), s1.to(tl.int32, bitcast=True)
    b2, b3 = s2.to(tl.int32, bitcast=True), s3.to(tl.int32, bitcast=True)
    high = tl.maximum(tl.maximum(b0, b1), tl.maximum(b2, b3))
    # A gap has no scale and must not count as the smallest.
    low = tl.minimum(
        tl.minimum(tl.where(row < count, b0, _INFINITY), tl.where(row + 1 < count, b1, _INFINITY)),
        tl.minimum(tl.where(row + 2 < count, b2, _INFINITY), tl.where(row + 3 < count, b3, _INFINITY)),
    )
    top, bottom = tl.reduce((high, low), 0, _larger_and_smaller)
    shrink = ((254 << 23) - top).to(tl.float32, bitcast=True)
    return _pair(s0 * shrink, s1 * shrink), _pair(s2 * shrink, s3 * shrink), top, bottom


@triton.jit
def columns_of_kernel(
    codes: tl.tensor,
    code_words: tl.tensor,
    row_scales: tl.tensor,
    tile_rows: tl.tensor,
    words: tl.tensor,
    scales: tl.tensor,
    num_columns: int,
    code_stride: int,
    row_scale_stride: int,
    tile_scale_stride: int,
    row_words: int,
    scale_stride: int,
    PACKED: tl.constexpr,
    HARDWARE_CAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
) -> None:
    """COLUMNS columns of one tile of tokens, from tiles along the other axis. PACKED: try FP16."""
    pieces = (num_columns + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // pieces
    piece = tl.program_id(0) % pieces
    first = tl.load(tile_rows + 2 * tile).to(tl.int64)
    count = tl.load(tile_rows + 2 * tile + 1)
    factors = row_scales + first * row_scale_stride
    at = piece * COLUMNS // _TILE
    made = (words, scales, row_words, scale_stride)
    is_done = False
    if PACKED:
        source = (code_words + first * (code_stride // 4), factors + at * tile_scale_stride)
        strides = (code_stride // 4, row_scale_stride)
        is_done = _retile_packed(source, strides, made, tile, count, piece, num_columns, COLUMNS)
    if not is_done:
        wide = (codes + first * code_stride, factors, code_stride, row_scale_stride, tile_scale_stride)
        # Where FP16 is the rule, few columns at once: this way must not set the number of registers.
        for start in tl.range(0, COLUMNS, WIDE, loop_unroll_factor=1):
            column = piece * COLUMNS + start + tl.arange(0, WIDE)
            is_column = column < num_columns
            quarters = ()
            for step in tl.static_range(4):
                row = 4 * tl.arange(0, 32) + step
                part = decode_quarter(wide, row, count, column, is_column, at, True, HARDWARE_CAST)
                quarters += (part,)  # type: ignore[assignment]
            store_columns(quarters, made, tile, count, column, num_columns, True, HARDWARE_CAST)


@triton.jit
def _retile_packed(
    source: tl.tuple,
    strides: tl.tuple,
    target: tl.tuple,
    tile: tl.tensor,
    count: tl.tensor,
    piece: tl.tensor,
    num_columns: tl.tensor,
    COLUMNS: tl.constexpr,
) -> Any:
    """Retile in FP16 if that is exact; whether it was, and is done.

    Args:
        source: (int32 words of codes of row 0, scale of row 0 in the tile of these columns).
        strides: distances of rows in both.
        target: as in `store_columns`.
    """
    code_words, row_scales = source
    word_stride, row_scale_stride = strides
    words, scales, row_words, scale_stride = target
    word = piece * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
    is_word = word < num_columns // 4
    row = 4 * tl.arange(0, 32)
    place = code_words + row[:, None] * word_stride + word[None, :]
    w0 = tl.load(place, mask=(row < count)[:, None] & is_word[None, :], other=0)
    w1 = tl.load(place + word_stride, mask=(row + 1 < count)[:, None] & is_word[None, :], other=0)
    w2 = tl.load(place + 2 * word_stride, mask=(row + 2 < count)[:, None] & is_word[None, :], other=0)
    w3 = tl.load(place + 3 * word_stride, mask=(row + 3 < count)[:, None] & is_word[None, :], other=0)
    first, second, top, bottom = _row_factors(row_scales, row_scale_stride, row, count)
    t0, t1, t2, t3 = _by_columns(w0, w1, w2, w3)
    first, second = first[:, None], second[:, None]
    p0, q0, m0 = _scaled_pairs(t0, first, second)
    p1, q1, m1 = _scaled_pairs(t1, first, second)
    p2, q2, m2 = _scaled_pairs(t2, first, second)
    p3, q3, m3 = _scaled_pairs(t3, first, second)
    amax01 = tl.reduce(_amax_of_two(m0, m1), 0, _larger_pair)
    amax23 = tl.reduce(_amax_of_two(m2, m3), 0, _larger_pair)
    e01, seen01 = _exponents(amax01)
    e23, seen23 = _exponents(amax23)
    seen = tl.reduce(_smaller_pair(seen01, seen23), 0, _smaller_pair)
    is_steep = ((seen & 0xFFFF) < 0x2000) | (((seen >> 16) & 0xFFFF) < 0x2000)
    is_even = (top >> 23) - (bottom >> 23) <= _LARGEST_SHIFT
    is_exact = (top >= _LOWEST_TOP) & (top < _INFINITY) & is_even & (is_steep == 0)
    if is_exact:
        c0, c1 = _encode_columns(p0, q0, p1, q1, e01[None, :])
        c2, c3 = _encode_columns(p2, q2, p3, q3, e23[None, :])
        joined = tl.join(tl.join(c0, c1), tl.join(c2, c3))  # [32, words, column's low bit, its high bit]
        turned = tl.reshape(tl.permute(joined, (1, 3, 2, 0)), (COLUMNS, 32))
        column = piece * COLUMNS + tl.arange(0, COLUMNS)
        to = words + column.to(tl.int64)[:, None] * row_words + (tile * 32 + tl.arange(0, 32))[None, :]
        tl.store(to, turned, mask=(column < num_columns)[:, None])
        to_scales = scales + tile.to(tl.int64) * scale_stride + 4 * word
        tl.store(to_scales, _scale_of(e01, amax01, top, 0), mask=is_word)
        tl.store(to_scales + 1, _scale_of(e01, amax01, top, 16), mask=is_word)
        tl.store(to_scales + 2, _scale_of(e23, amax23, top, 0), mask=is_word)
        tl.store(to_scales + 3, _scale_of(e23, amax23, top, 16), mask=is_word)
    return is_exact


def columns_of_on_device(
    tiles: Tiles,
    groups: Groups | None = None,
    *,
    hardware_cast: bool | None = None,
    columns: int = COLUMNS,
    num_warps: int = WARPS,
    max_registers: int | None = None,
) -> Tiles:
    """Tiles along the tokens from tiles along the features, for a weight gradient.

    Args:
        tiles: [m, k] with scales that are powers of two: then a value is exact and rounded once more.
        groups: of the rows; None: one group.
        hardware_cast: use the conversion instructions; None: where the device has them.
        columns: of a program; a power of two up to 128.
        num_warps: of a program.
        max_registers: of a thread; None: as the compiler likes.

    Returns:
        Tiles [k, padded m].
    """
    codes = tiles.codes
    groups = groups or Groups.one(codes.shape[0], codes.device)
    made = empty_tiles(codes.shape[1], groups.num_padded, codes.device)
    if made.codes.numel():
        is_hardware = casts_in_hardware(codes.device, hardware_cast)
        packed = is_hardware and (codes.shape[1] | codes.stride(0) | codes.data_ptr()) % 4 == 0
        columns_of_kernel[(groups.num_padded // TILE * triton.cdiv(codes.shape[1], columns),)](
            codes,
            codes.view(torch.int32) if packed else None,
            tiles.scales,
            groups.tile_rows,
            as_words(made.codes),
            made.scales,
            codes.shape[1],
            codes.stride(0),
            tiles.scales.stride(0),
            tiles.scales.stride(1),
            made.codes.shape[1] // 4,
            made.scales.stride(1),
            PACKED=packed,
            HARDWARE_CAST=is_hardware,
            COLUMNS=columns,
            WIDE=min(columns, 32) if packed else columns,
            **launch_options(num_warps, max_registers),
        )
    return made
