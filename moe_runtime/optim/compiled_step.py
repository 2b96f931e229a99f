"""The step on the CPU by compiled C++ (`fused_step.cpp`): FP8 and BF16 moments of float32 parameters.

Threads are as many as torch would use (`torch.get_num_threads()`); the bits do not depend on their number.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.optim.counter_rng import kernel_words
from moe_runtime.optim.moments import (
    BLOCK,
    MEAN,
    MIN_SCALE_EXPONENT,
    RATIO_CODES,
    ROOT_CODES,
    ROOT_SCALE,
    SCALE_BIAS,
    SQUARE,
    Noise,
    State,
)
from moe_runtime.optim.native_build import load_library
from moe_runtime.optim.update import Factors

SOURCE = Path(__file__).with_name("fused_step.cpp")
# Elements of one call: at most one 2^32 boundary of the noise lies within.
_CALL_ELEMENTS = 1 << 31


@cache
def open_library() -> ctypes.CDLL:
    """Compile (once for a machine) and load.

    Raises:
        BuildError: it cannot be.
    """
    library = load_library(SOURCE)
    pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    head = (pointer, pointer, integer, pointer, pointer)  # value, grad, is_half, two of the state
    library.moe_step_fp8.argtypes = (*head, *(pointer,) * 3, long, pointer, pointer, long, integer, integer)
    library.moe_step_bf16.argtypes = (*head, pointer, long, pointer, integer)
    library.moe_step_fp8.restype = library.moe_step_bf16.restype = None
    return library


def fp8_step(
    value: Tensor,
    grad: Tensor,
    state: State,
    factors: Factors,
    noise: Noise,
    working: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """One step in place.

    Args:
        value: float32 [n] on the CPU, contiguous.
        grad: [n], contiguous; float32 and bfloat16 are read as they are, others converted.
        state: of Fp8Moments for n elements.
        working: bfloat16 [n], contiguous: gets the new weight, rounded to nearest.
        counters: see `statistics`; what the step counts is added to the first lane.
    """
    grad = _readable(grad)
    for start in range(0, value.numel(), _CALL_ELEMENTS):
        words, carry = kernel_words(noise.key, noise.offset + start)
        block = start // BLOCK
        open_library().moe_step_fp8(
            value[start:].data_ptr(),
            grad[start:].data_ptr(),
            grad.dtype == torch.bfloat16,
            state[RATIO_CODES][block:].data_ptr(),
            state[ROOT_CODES][block:].data_ptr(),
            state[ROOT_SCALE][block:].data_ptr(),
            None if working is None else working[start:].data_ptr(),
            None if counters is None else counters.data_ptr(),
            min(_CALL_ELEMENTS, value.numel() - start),
            _floats(factors),
            (ctypes.c_uint32 * len(words))(*words),
            carry,
            SCALE_BIAS + MIN_SCALE_EXPONENT,
            torch.get_num_threads(),
        )


def bf16_step(
    value: Tensor,
    grad: Tensor,
    state: State,
    factors: Factors,
    noise: Noise,
    working: Tensor | None = None,
    counters: Tensor | None = None,
) -> None:
    """One step in place, with moments of Bf16Moments; else as `fp8_step`. Nothing is random or counted."""
    grad = _readable(grad)
    open_library().moe_step_bf16(
        value.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        state[MEAN].data_ptr(),
        state[SQUARE].data_ptr(),
        None if working is None else working.data_ptr(),
        value.numel(),
        _floats(factors),
        torch.get_num_threads(),
    )


def _readable(grad: Tensor) -> Tensor:
    return grad if grad.dtype == torch.bfloat16 else grad.to(torch.float32)


def _floats(factors: Factors) -> "ctypes.Array[ctypes.c_float]":
    numbers = factors.of_an_element()
    return (ctypes.c_float * len(numbers))(*numbers)
