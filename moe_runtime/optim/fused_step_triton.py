"""The AdamW step with FP8 moments on a GPU, in one pass over memory.

Bytes an element: weight 4 + 4, gradient 4 (BF16: 2), codes of m and sqrt(v) 2 + 2, scales 2/128; with the
BF16 working weight 2 more. That is 18.02 with everything, and the step is done when they have moved: one
launch, nothing kept between passes. The arithmetic is that of `update.py`, the storage that of
`moments.py`, both to the bit: square root and division rounded as IEEE says, no fused products
(`enable_fp_fusion=False`), integer rounding.

    a warp      one block of 128 at a time: 4 elements a thread, so that weights travel in 16-byte and codes
                in 4-byte accesses of whole lines, and the block's largest root is found within the warp
    a program   ROWS blocks and no loop. About 115 instructions an element are needed, which at Hopper's rate
                is just below the time of the bytes: hence no masks and no 64-bit index in the main launch
    the tail    what does not fill a program (and a last block that is not full) gets a second, masked launch

The four bytes a thread takes of codes are forced: told that they are aligned to 16, Triton would give a
thread 16 codes and pay a trip through shared memory to bring the weights into that form; so their
alignment is not specialised but stated as 4.

Decoding is one product: the code shifted to where FP32 has exponent and mantissa is its value times a
power of two, subnormals too (the GPU multiplies those at full speed).
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.optim.counter_rng import MULTIPLIERS, SECOND_MULTIPLIER, SHIFTS, as_signed, kernel_words
from moe_runtime.optim.moments import (
    BLOCK,
    MIN_SCALE_EXPONENT,
    RATIO_CODES,
    ROOT_CODES,
    ROOT_SCALE,
    SCALE_BIAS,
    Noise,
    State,
)
from moe_runtime.optim.statistics import COLUMNS, LANES
from moe_runtime.optim.update import Factors

_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
_SHIFT_0: tl.constexpr = tl.constexpr(SHIFTS[0])
_SHIFT_1: tl.constexpr = tl.constexpr(SHIFTS[1])
_SHIFT_2: tl.constexpr = tl.constexpr(SHIFTS[2])
_MULTIPLIER_0: tl.constexpr = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER_1: tl.constexpr = tl.constexpr(MULTIPLIERS[1])
_MULTIPLIER_2: tl.constexpr = tl.constexpr(SECOND_MULTIPLIER)
_FRACTION_MASK: tl.constexpr = tl.constexpr((1 << 27) - 1)
# UE5M3: bias 15, smallest 2^-17, largest exponent 16 with mantissa 6/8, NaN 0xFF.
_ROOT_REBIAS: tl.constexpr = tl.constexpr((127 - 15) << 23)
_ROOT_NORMAL: tl.constexpr = tl.constexpr((128 - 15) << 23)
_ROOT_FIXED: tl.constexpr = tl.constexpr(2.0**44)  # quanta, and 27 bits of fraction
_ROOT_UNIT: tl.constexpr = tl.constexpr(2.0**112)
_ROOT_ROUND: tl.constexpr = tl.constexpr(0x1FFFFF)  # carries where the mantissa exceeds 6/8
# E4M3: bias 7, smallest 2^-9, NaN 0x7F; its values are 2^4 m / sqrt(v).
_RATIO_REBIAS: tl.constexpr = tl.constexpr((127 - 7) << 23)
_RATIO_NORMAL: tl.constexpr = tl.constexpr((128 - 7) << 23)
_RATIO_FIXED: tl.constexpr = tl.constexpr(2.0**36)
_RATIO_EXPONENT: tl.constexpr = tl.constexpr(4)
_MIN_SCALE: tl.constexpr = tl.constexpr(SCALE_BIAS + MIN_SCALE_EXPONENT)

# Elements of one launch: positions fit 32 bits, and at most one 2^32 boundary of the noise lies within.
_LAUNCH_ELEMENTS = 1 << 30
# Measured on an H200: 90 % of the bound; (8, 4) and (4, 2) 88 to 89 %, one row a warp 85 %.
ROWS, NUM_WARPS = 2, 1
_LANES: tl.constexpr = tl.constexpr(LANES)
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


@triton.jit
def random_word(
    at: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    next_first: tl.tensor,
    next_second: tl.tensor,
    carry: tl.tensor,
    CARRIES: tl.constexpr,
) -> Any:
    """The bits of counter_rng.random_bits for elements `at`, uint32; from `carry` on by the next words."""
    if CARRIES:
        first = tl.where(at < carry, first, next_first)
        second = tl.where(at < carry, second, next_second)
    bits = (at + first).to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> _SHIFT_0)) * _MULTIPLIER_0
    bits += second.to(tl.uint32, bitcast=True)
    bits = (bits ^ (bits >> _SHIFT_1)) * _MULTIPLIER_1
    return bits ^ (bits >> _SHIFT_2)


@triton.jit
def decode_root(code: tl.tensor, power: tl.tensor) -> Any:
    """Values of UE5M3 codes (int32 [ROWS, 128]) times a power of two ([ROWS]); NaN's code reads as 122880."""
    return (code << 20).to(tl.float32, bitcast=True) * _ROOT_UNIT * power[:, None]


@triton.jit
def encode(
    bits: tl.tensor,
    noise: tl.tensor,
    REBIAS: tl.constexpr,
    NORMAL: tl.constexpr,
    FIXED: tl.constexpr,
    LARGEST: tl.constexpr,
) -> Any:
    """formats.encode_stochastic of FP32 `bits` (int32), without the sign; int32 codes."""
    magnitude = bits & _MAGNITUDE
    threshold = noise.to(tl.int32, bitcast=True) & _FRACTION_MASK
    small = tl.minimum(magnitude, NORMAL).to(tl.float32, bitcast=True)
    fixed = ((small * FIXED).to(tl.int32) + threshold) >> 27
    normal = (magnitude + ((threshold >> 7) - REBIAS)) >> 20
    code = tl.minimum(tl.maximum(normal, fixed), LARGEST)
    return tl.where(magnitude >= _INFINITY, LARGEST + 1, code)


@triton.jit
def power_of_two(biased: tl.tensor) -> Any:
    """2^(biased - 127), float32."""
    return (biased << 23).to(tl.float32, bitcast=True)


@triton.jit
def count_step(
    counters: tl.tensor,
    quotient: tl.tensor,
    square: tl.tensor,
    old_square: tl.tensor,
    stored: tl.tensor,
    root_code: tl.tensor,
    ratio_code: tl.tensor,
    scale: tl.tensor,
    is_inside: tl.tensor,
) -> None:
    """Add what one program saw to a lane of `counters`; see statistics.py.

    Counts of a row fit eight bits, so four travel in one sum; and what would change nothing is not sent.
    """
    counters += (tl.program_id(0) % _LANES) * _COLUMNS
    is_zero, is_nan = root_code == 0, root_code == 0xFF
    is_lost = is_zero & (square > 0)
    is_saturated = (ratio_code & 0x7F) == 0x7E
    is_stalled = (stored == old_square) & (square != old_square) & (root_code != 0xFF)
    flags = is_zero.to(tl.uint32) + (is_lost.to(tl.uint32) << 8)
    flags += (is_saturated.to(tl.uint32) << 16) + (is_stalled.to(tl.uint32) << 24)
    in_row = tl.sum(tl.where(is_inside, flags, 0), axis=1).to(tl.uint32)
    for column in tl.static_range(4):
        found = tl.sum(((in_row >> (8 * column)) & 0xFF).to(tl.int32), axis=0)
        tl.atomic_add(counters + column, found.to(tl.int64), mask=found > 0, sem="relaxed")
    nans = tl.sum(tl.sum((is_inside & is_nan).to(tl.int32), axis=1), axis=0)
    tl.atomic_add(counters + 4, nans.to(tl.int64), mask=nans > 0, sem="relaxed")
    is_used = tl.max(root_code, axis=1) > 0
    smallest = tl.min(tl.where(is_used, scale, 255), axis=0).to(tl.int64)
    largest = tl.max(tl.where(is_used, scale, -1), axis=0).to(tl.int64)
    size = tl.where(is_inside, quotient.to(tl.int32, bitcast=True) & _MAGNITUDE, 0)
    most = tl.max(tl.max(size, axis=1), axis=0).to(tl.int64)
    tl.atomic_min(counters + 5, smallest, mask=smallest < tl.load(counters + 5), sem="relaxed")
    tl.atomic_max(counters + 6, largest, mask=largest > tl.load(counters + 6), sem="relaxed")
    tl.atomic_max(counters + 7, most, mask=most > tl.load(counters + 7), sem="relaxed")


@triton.jit
def adamw(
    value: tl.tensor,
    grad: tl.tensor,
    mean: tl.tensor,
    square: tl.tensor,
    kept: float,
    mean_gain: float,
    square_kept: float,
    square_gain: float,
    root_factor: float,
    eps: float,
    step_size: float,
) -> Any:
    """update.update: (weight, m, v, sqrt(v), quotient), all float32."""
    mean = mean + (grad - mean) * mean_gain
    square = square * square_kept + (grad * square_gain) * grad
    root = tl.sqrt_rn(square)
    quotient = tl.div_rn(mean, root * root_factor + eps)
    return value * kept - quotient * step_size, mean, square, root, quotient


@triton.jit
def lifted(noise: tl.tensor) -> Any:
    """See `moments.lifted`; uint32 as `noise`."""
    threshold = noise.to(tl.int32, bitcast=True) & _FRACTION_MASK
    leading = threshold >> 15
    return threshold + ((leading * (4095 - leading) * 3) >> 4)


@triton.jit
def encode_block(mean: tl.tensor, root: tl.tensor, noise: tl.tensor) -> Any:
    """Fp8Moments.write: (codes of sqrt(v), codes of m / sqrt(v), biased scales [ROWS], new roots)."""
    bits = root.to(tl.int32, bitcast=True)
    largest = tl.minimum(tl.max(bits & _MAGNITUDE, axis=1), _INFINITY)
    scale = tl.maximum(((largest + _ROOT_ROUND) >> 23) - 16, _MIN_SCALE)
    scaled = root * power_of_two(254 - scale)[:, None]
    code = encode(
        scaled.to(tl.int32, bitcast=True), lifted(noise), _ROOT_REBIAS, _ROOT_NORMAL, _ROOT_FIXED, 0xFE
    )
    units = decode_root(code, power_of_two(scale - _RATIO_EXPONENT))
    ratio = tl.div_rn(mean, units).to(tl.int32, bitcast=True)  # anything where the root is zero
    again = noise * _MULTIPLIER_2
    ratio_code = encode(ratio, again, _RATIO_REBIAS, _RATIO_NORMAL, _RATIO_FIXED, 0x7E)
    ratio_code = tl.where(code == 0, 0, ratio_code | ((ratio >> 24) & 0x80))
    return code, ratio_code, scale, units


@triton.jit(
    do_not_specialize=["first_block", "first_word", "second_word", "next_first", "next_second", "carry"],
    do_not_specialize_on_alignment=["mean_codes", "root_codes", "working"],
)
def fused_step_kernel(
    values: tl.tensor,
    grads: tl.tensor,
    mean_codes: tl.tensor,
    root_codes: tl.tensor,
    scales: tl.tensor,
    working: tl.tensor,
    counters: tl.tensor,
    num_elements: int, first_block: int,
    first_word: int, second_word: int, next_first: int, next_second: int, carry: int,
    kept: float, mean_gain: float, square_kept: float, square_gain: float,
    root_factor: float, eps: float, step_size: float,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    CARRIES: tl.constexpr,
    WORKING: tl.constexpr,
    COUNTED: tl.constexpr,
) -> None:  # fmt: skip
    """One step of ROWS blocks; all counts and positions are from the pointers given.

    MASKED: the last blocks may be missing or not full. CARRIES: from position `carry` on the words of the
    noise are the next two. WORKING: write the BF16 weight too. COUNTED: add to `counters`.
    """
    row = first_block + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    is_row = row * _BLOCK < num_elements if MASKED else None
    is_inside = at < num_elements if MASKED else None
    other: tl.constexpr = 0 if MASKED else None
    grad_at = grads + at
    if grads.dtype.element_ty.primitive_bitwidth == 16:
        grad_at = tl.multiple_of(grad_at, [8, 8])
    grad = tl.load(grad_at, is_inside, other, eviction_policy="evict_first").to(tl.float32)
    value = tl.load(values + at, is_inside, other, eviction_policy="evict_first")
    mean_at, root_at = tl.multiple_of(mean_codes + at, [4, 4]), tl.multiple_of(root_codes + at, [4, 4])
    old_ratio = tl.load(mean_at, is_inside, other, eviction_policy="evict_first")
    old_code = tl.load(root_at, is_inside, other, eviction_policy="evict_first").to(tl.int32)
    old_power = power_of_two(tl.load(scales + row, is_row, other).to(tl.int32))
    old_root = tl.where(old_code == 0xFF, float("nan"), decode_root(old_code, old_power))
    old_square = old_root * old_root
    old_mean = old_ratio.to(tl.float8e4nv, bitcast=True).to(tl.float32) * (old_root * 0.0625)
    value, mean, square, root, quotient = adamw(
        value, grad, old_mean, old_square,
        kept, mean_gain, square_kept, square_gain, root_factor, eps, step_size,
    )  # fmt: skip
    noise = random_word(at, first_word, second_word, next_first, next_second, carry, CARRIES)
    code, ratio_code, scale, units = encode_block(mean, root, noise)
    tl.store(values + at, value, is_inside)
    tl.store(mean_at, ratio_code.to(tl.uint8), is_inside)
    tl.store(root_at, code.to(tl.uint8), is_inside)
    tl.store(scales + row, scale.to(tl.uint8), is_row)
    if WORKING:
        tl.store(tl.multiple_of(working + at, [8, 8]), value.to(tl.bfloat16), is_inside)
    if COUNTED:
        inside = at < num_elements
        stored = (units * 16.0) * (units * 16.0)
        count_step(counters, quotient, square, old_square, stored, code, ratio_code, scale, inside)


def fused_step(
    value: Tensor,
    grad: Tensor,
    state: State,
    factors: Factors,
    noise: Noise,
    working: Tensor | None = None,
    counters: Tensor | None = None,
    rows: int = ROWS,
    num_warps: int = NUM_WARPS,
) -> None:
    """One step in place, on a CUDA device (or anywhere under TRITON_INTERPRET=1).

    Args:
        value: float32 [n], contiguous.
        grad: [n] float32, bfloat16 or float16, contiguous.
        state: of Fp8Moments for n elements.
        working: bfloat16 [n], contiguous: gets the new weight, rounded to nearest.
        counters: see statistics.py; what the step counts is added.
        rows: blocks of a program; with `num_warps` for measurements, any two give the same bits.
    """
    for start in range(0, value.numel(), _LAUNCH_ELEMENTS):
        part = slice(start, start + _LAUNCH_ELEMENTS)
        blocks = slice(start // BLOCK, (start + _LAUNCH_ELEMENTS) // BLOCK)
        tensors = (
            value[part],
            grad[part],
            state[RATIO_CODES][blocks],
            state[ROOT_CODES][blocks],
            state[ROOT_SCALE][blocks],
            # Of no use where it is not asked for, but a kernel's pointers point somewhere.
            value[part] if working is None else working[part],
            state[ROOT_SCALE] if counters is None else counters,
        )
        options = {"WORKING": working is not None, "COUNTED": counters is not None, "num_warps": num_warps}
        _launch(tensors, factors, Noise(noise.key, noise.offset + start), rows, options)


def _launch(
    tensors: tuple[Tensor, ...], factors: Factors, noise: Noise, rows: int, options: dict[str, Any]
) -> None:
    """The unmasked launch, and the masked one if anything is left."""
    count = tensors[0].numel()
    words, carry = kernel_words(noise.key, noise.offset)
    whole = count // (rows * BLOCK)
    rest = triton.cdiv(count - whole * rows * BLOCK, rows * BLOCK)
    for grid, first_block, masked in ((whole, 0, False), (rest, whole * rows, True)):
        if grid:
            fused_step_kernel[(grid,)](
                *tensors,
                count,
                first_block,
                *map(as_signed, words),
                min(carry, count),
                *factors.of_an_element(),
                ROWS=rows,
                MASKED=masked,
                CARRIES=carry < count,
                enable_fp_fusion=False,
                **options,
            )
