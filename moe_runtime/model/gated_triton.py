"""SwiGLU in one pass over memory each way, on a GPU, with the weights of rows where there are any.

Eager SwiGLU in BF16 widens its factors to FP32 and narrows the product in kernels of their own: three to
four times the bytes that it needs. Here all is FP32 within registers and rounded once. The backward gives
the product again too, which the weight gradient of the down projection multiplies, since it has all that it
is made of at hand. The eager forms of `ffn.py` are the oracle.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 2048, 4


@triton.jit
def swiglu_kernel(
    gate_up: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    width: int,
    gate_up_stride: int,
    out_stride: int,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A stretch of one row."""
    pieces = (width + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // pieces).to(tl.int64)
    column = (tl.program_id(0) % pieces) * BLOCK + tl.arange(0, BLOCK)
    is_inside = column < width
    gate = tl.load(gate_up + row * gate_up_stride + column, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * gate_up_stride + width + column, mask=is_inside, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        product *= tl.load(weights + row).to(tl.float32)
    tl.store(out + row * out_stride + column, product.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def swiglu_backward_kernel(
    d_product: tl.tensor,
    gate_up: tl.tensor,
    weights: tl.tensor,
    d_gate_up: tl.tensor,
    again: tl.tensor,
    d_weights: tl.tensor,
    d_product_stride: int,
    gate_up_stride: int,
    d_gate_up_stride: int,
    WIDTH: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + row).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        is_inside = column < WIDTH
        source = gate_up + row * gate_up_stride + column
        gate = tl.load(source, mask=is_inside, other=0.0).to(tl.float32)
        up = tl.load(source + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
        place = d_product + row * d_product_stride + column
        pull = tl.load(place, mask=is_inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        if WEIGHTED:
            total += pull * silu * up
            product = (silu * up * weight).to(again.dtype.element_ty)
            tl.store(again + row * WIDTH + column, product, mask=is_inside)
            pull *= weight
        d_gate = pull * up * (sigmoid + silu * (1.0 - sigmoid))
        target = d_gate_up + row * d_gate_up_stride + column
        tl.store(target, d_gate.to(d_gate_up.dtype.element_ty), mask=is_inside)
        tl.store(target + WIDTH, (pull * silu).to(d_gate_up.dtype.element_ty), mask=is_inside)
    if WEIGHTED:
        tl.store(d_weights + row, tl.sum(total, axis=0).to(d_weights.dtype.element_ty))


def serves(gate_up: Tensor) -> bool:
    """Whether the kernels take such factors."""
    return gate_up.is_cuda and gate_up.dtype in (torch.bfloat16, torch.float16) and gate_up.stride(-1) == 1


def gated(gate_up: Tensor, row_weights: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """silu(gate) x up (x weight) of gate_up [..., 2f], gate first: [..., f] of its dtype.

    Args:
        row_weights: [rows].
        out: where to write it; its rows may lie apart.
    """
    flat = gate_up.reshape(-1, gate_up.shape[-1])
    width = flat.shape[1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width) if out is None else out
    target = out.view(-1, width)
    if target.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        swiglu_kernel[(flat.shape[0] * triton.cdiv(width, block),)](
            flat,
            flat if row_weights is None else row_weights,
            target,
            width,
            flat.stride(0),
            target.stride(0),
            WEIGHTED=row_weights is not None,
            BLOCK=block,
            num_warps=WARPS,
        )
    return out


def gated_backward(
    d_product: Tensor, gate_up: Tensor, d_gate_up: Tensor, row_weights: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Write the gradient of `gated` into d_gate_up [..., 2f].

    Returns:
        With row_weights [rows], the product again [rows, f], weighted, and the gradient of the weights.
    """
    width = gate_up.shape[-1] // 2
    pull, flat = d_product.reshape(-1, width), gate_up.reshape(-1, 2 * width)
    target = d_gate_up.view(-1, 2 * width)
    weighted = row_weights is not None
    again = flat.new_empty(flat.shape[0], width) if weighted else flat
    weights = flat if row_weights is None else row_weights
    d_weights = flat if row_weights is None else torch.zeros_like(row_weights)
    if target.numel():
        swiglu_backward_kernel[(flat.shape[0],)](
            pull,
            flat,
            weights,
            target,
            again,
            d_weights,
            pull.stride(0),
            flat.stride(0),
            target.stride(0),
            WIDTH=width,
            WEIGHTED=weighted,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)),
            num_warps=WARPS,
        )
    return (again, d_weights) if weighted else None
