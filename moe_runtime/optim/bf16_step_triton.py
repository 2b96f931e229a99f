"""The AdamW step with BF16 moments on a GPU, in one pass over memory. Ref: DSV3 §3.3.3.

22 bytes an element with the BF16 working weight. The arithmetic is that of `update.py` to the bit. Moments
are rounded in integers, and travel as int16, because Triton's interpreter cuts BF16 off where the GPU rounds;
nothing here is short of instructions.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, int16

from moe_runtime.optim.fused_step_triton import adamw
from moe_runtime.optim.moments import MEAN, SQUARE, Noise, State
from moe_runtime.optim.update import Factors

_LAUNCH_ELEMENTS = 1 << 30
_SIZE, _NUM_WARPS = 1024, 4


@triton.jit
def from_bf16(bits: tl.tensor) -> Any:
    """int16 bits of BF16 as float32."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def to_bf16(values: tl.tensor) -> Any:
    """int16 bits of BF16, nearest, ties to even; NaN stays NaN."""
    bits = values.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.int16)


@triton.jit(
    do_not_specialize=["first_program"],
    do_not_specialize_on_alignment=["means", "squares", "working"],
)
def bf16_step_kernel(
    values: tl.tensor,
    grads: tl.tensor,
    means: tl.tensor,
    squares: tl.tensor,
    working: tl.tensor,
    num_elements: int,
    first_program: int,
    kept: float,
    mean_gain: float,
    square_kept: float,
    square_gain: float,
    root_factor: float,
    eps: float,
    step_size: float,
    SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    WORKING: tl.constexpr,
) -> None:
    """SIZE elements a program; MASKED: some may not exist."""
    at = (first_program + tl.program_id(0)) * SIZE + tl.arange(0, SIZE)
    inside = at < num_elements if MASKED else None
    other: tl.constexpr = 0 if MASKED else None
    # Aligned to 8 bytes, so that a thread takes 4 elements of everything; see fused_step_triton.py.
    mean_at, square_at = tl.multiple_of(means + at, 8), tl.multiple_of(squares + at, 8)
    grad_at = grads + at
    if grads.dtype.element_ty.primitive_bitwidth == 16:
        grad_at = tl.multiple_of(grad_at, 8)
    grad = tl.load(grad_at, inside, other, eviction_policy="evict_first").to(tl.float32)
    value = tl.load(values + at, inside, other, eviction_policy="evict_first")
    mean = from_bf16(tl.load(mean_at, inside, other, eviction_policy="evict_first"))
    square = from_bf16(tl.load(square_at, inside, other, eviction_policy="evict_first"))
    value, mean, square, _, _ = adamw(
        value, grad, mean, square, kept, mean_gain, square_kept, square_gain, root_factor, eps, step_size
    )
    tl.store(values + at, value, inside)
    tl.store(mean_at, to_bf16(mean), inside)
    tl.store(square_at, to_bf16(square), inside)
    if WORKING:
        tl.store(tl.multiple_of(working + at, 8), to_bf16(value), inside)


def bf16_step(
    value: Tensor,
    grad: Tensor,
    state: State,
    factors: Factors,
    noise: Noise,
    working: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """One step in place, on a CUDA device (or anywhere under TRITON_INTERPRET=1).

    Nothing is random or counted: `noise` and `counters` are there for the signature.

    Args:
        value: float32 [n], contiguous.
        grad: [n] float32, bfloat16 or float16, contiguous.
        state: of Bf16Moments for n elements.
        working: bfloat16 [n], contiguous: gets the new weight, rounded to nearest.
    """
    sixteen = [state[MEAN].view(-1).view(int16), state[SQUARE].view(-1).view(int16)]
    sixteen.append(sixteen[0] if working is None else working.view(int16))
    for start in range(0, value.numel(), _LAUNCH_ELEMENTS):
        part = slice(start, start + _LAUNCH_ELEMENTS)
        tensors = [tensor[part] for tensor in (value, grad, *sixteen)]
        count = tensors[0].numel()
        whole = count // _SIZE
        for grid, first, masked in ((whole, 0, False), (int(count % _SIZE > 0), whole, True)):
            if grid:
                bf16_step_kernel[(grid,)](
                    *tensors,
                    count,
                    first,
                    *factors.of_an_element(),
                    SIZE=_SIZE,
                    MASKED=masked,
                    WORKING=working is not None,
                    num_warps=_NUM_WARPS,
                    enable_fp_fusion=False,
                )
