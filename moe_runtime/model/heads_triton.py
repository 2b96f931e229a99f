"""Queries, keys and values of attention in one pass over memory each way, on a GPU.

The eager form (`mla._join_heads`) copies the parts without positions, widens the rotary parts to FP32, turns
them, narrows them and joins all: a dozen kernels, three times the traffic. Here a program takes one token,
some heads at a time; what is turned never leaves registers. The rotary key is turned once a token and
written for every head; its gradient, a sum over heads, stays within the program too.

    forward    q [t, h, nope + rope], kv [t, h, nope + v], k_rope [t, rope] -> query, key, value
    backward   their gradients -> those of q, kv and k_rope

The eager form is the oracle: the same sums in FP32, so results differ by the order of a sum and fused
multiply-adds at most. Ref: DSV3 (3)-(9)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS, WARPS = 8, 4  # heads taken at a time


@triton.jit
def turn(x: tl.tensor, cosine: tl.tensor, sine: tl.tensor, ROWS: tl.constexpr, ROPE: tl.constexpr) -> Any:
    """float32 [ROWS, ROPE], its pairs turned."""
    even, odd = tl.split(tl.reshape(x, (ROWS, ROPE // 2, 2)))
    turned = tl.join(
        even * cosine[None, :] - odd * sine[None, :], even * sine[None, :] + odd * cosine[None, :]
    )
    return tl.reshape(turned, (ROWS, ROPE))


@triton.jit
def join_kernel(
    q: tl.tensor,
    kv: tl.tensor,
    k_rope: tl.tensor,
    turns: tl.tensor,
    query: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    seq_len: int,
    k_rope_stride: int,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_ROOM: tl.constexpr,
    V_ROOM: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, ROPE // 2)
    place = turns + (token % seq_len) * ROPE
    cosine, sine = tl.load(place + 2 * pair), tl.load(place + 2 * pair + 1)
    rope, nope, wide = tl.arange(0, ROPE), tl.arange(0, NOPE_ROOM), tl.arange(0, V_ROOM)
    alone = tl.load(k_rope + token * k_rope_stride + rope[None, :]).to(tl.float32)
    shared = turn(alone, cosine, sine, 1, ROPE).to(key.dtype.element_ty)
    for first in range(0, NUM_HEADS, HEADS):
        head = first + tl.arange(0, HEADS)
        row = (token * NUM_HEADS + head)[:, None]
        is_head = (head < NUM_HEADS)[:, None]
        is_nope, is_v = is_head & (nope < NOPE)[None, :], is_head & (wide < V)[None, :]
        at_nope, at_rope = row * (NOPE + ROPE) + nope[None, :], row * (NOPE + ROPE) + NOPE + rope[None, :]
        in_kv = kv + row * (NOPE + V)
        tl.store(query + at_nope, tl.load(q + at_nope, mask=is_nope), mask=is_nope)
        part = tl.load(q + at_rope, mask=is_head, other=0.0).to(tl.float32)
        turned = turn(part, cosine, sine, HEADS, ROPE)
        tl.store(query + at_rope, turned.to(query.dtype.element_ty), mask=is_head)
        tl.store(key + at_nope, tl.load(in_kv + nope[None, :], mask=is_nope), mask=is_nope)
        tl.store(key + at_rope, tl.broadcast_to(shared, (HEADS, ROPE)), mask=is_head)
        its_value = tl.load(in_kv + NOPE + wide[None, :], mask=is_v)
        tl.store(value + row * V + wide[None, :], its_value, mask=is_v)


@triton.jit
def part_kernel(
    d_query: tl.tensor,
    d_key: tl.tensor,
    d_value: tl.tensor,
    turns: tl.tensor,
    d_q: tl.tensor,
    d_kv: tl.tensor,
    d_k_rope: tl.tensor,
    seq_len: int,
    NUM_HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    ROPE: tl.constexpr,
    V: tl.constexpr,
    NOPE_ROOM: tl.constexpr,
    V_ROOM: tl.constexpr,
    HEADS: tl.constexpr,
) -> None:
    """The backward of one token."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, ROPE // 2)
    place = turns + (token % seq_len) * ROPE
    cosine, sine = tl.load(place + 2 * pair), -tl.load(place + 2 * pair + 1)
    rope, nope, wide = tl.arange(0, ROPE), tl.arange(0, NOPE_ROOM), tl.arange(0, V_ROOM)
    total = tl.zeros((1, ROPE), tl.float32)
    for first in range(0, NUM_HEADS, HEADS):
        head = first + tl.arange(0, HEADS)
        row = (token * NUM_HEADS + head)[:, None]
        is_head = (head < NUM_HEADS)[:, None]
        is_nope, is_v = is_head & (nope < NOPE)[None, :], is_head & (wide < V)[None, :]
        at_nope, at_rope = row * (NOPE + ROPE) + nope[None, :], row * (NOPE + ROPE) + NOPE + rope[None, :]
        in_kv = d_kv + row * (NOPE + V)
        tl.store(d_q + at_nope, tl.load(d_query + at_nope, mask=is_nope), mask=is_nope)
        part = tl.load(d_query + at_rope, mask=is_head, other=0.0).to(tl.float32)
        turned = turn(part, cosine, sine, HEADS, ROPE)
        tl.store(d_q + at_rope, turned.to(d_q.dtype.element_ty), mask=is_head)
        tl.store(in_kv + nope[None, :], tl.load(d_key + at_nope, mask=is_nope), mask=is_nope)
        its_value = tl.load(d_value + row * V + wide[None, :], mask=is_v)
        tl.store(in_kv + NOPE + wide[None, :], its_value, mask=is_v)
        pulls = tl.load(d_key + at_rope, mask=is_head, other=0.0).to(tl.float32)
        total += tl.sum(pulls, axis=0)[None, :]
    back = turn(total, cosine, sine, 1, ROPE).to(d_k_rope.dtype.element_ty)
    tl.store(d_k_rope + token * ROPE + rope[None, :], back)


def serves(q: Tensor, rope: int) -> bool:
    """Whether the kernels take such heads."""
    is_low = q.dtype in (torch.bfloat16, torch.float16, torch.float32)
    return q.is_cuda and is_low and rope >= 2 and rope & (rope - 1) == 0


def join_heads(q: Tensor, kv: Tensor, k_rope: Tensor, turns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """query and key [batch, seq, heads, nope + rope], value [batch, seq, heads, v], in the dtype of q.

    Args:
        q: [batch, seq, heads, nope + rope]; kv: [batch, seq, heads, nope + v].
        k_rope: [batch, seq, rope], a power of two.
        turns: complex64 [seq, rope / 2].
    """
    q, kv, rope = q.contiguous(), kv.contiguous(), k_rope.shape[-1]
    flat = k_rope.reshape(-1, rope)
    sizes = _sizes(q.shape[-2], q.shape[-1] - rope, rope, kv.shape[-1])
    query, key = torch.empty_like(q), torch.empty_like(q)
    value = q.new_empty(*kv.shape[:-1], sizes["V"])
    if flat.shape[0]:
        angles = torch.view_as_real(turns)
        join_kernel[(flat.shape[0],)](
            q, kv, flat, angles, query, key, value, q.shape[1], flat.stride(0), **sizes, num_warps=WARPS
        )
    return query, key, value


def part_heads(
    d_query: Tensor, d_key: Tensor, d_value: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, kv and k_rope from those of query, key and value, all shaped as in `join_heads`."""
    d_query, d_key, d_value = (grad.contiguous() for grad in (d_query, d_key, d_value))
    rope = 2 * turns.shape[1]
    nope = d_query.shape[-1] - rope
    sizes = _sizes(d_query.shape[-2], nope, rope, nope + d_value.shape[-1])
    d_q = torch.empty_like(d_query)
    d_kv = d_query.new_empty(*d_query.shape[:-1], nope + d_value.shape[-1])
    d_k_rope = d_query.new_empty(*d_query.shape[:2], rope)
    if d_k_rope.numel():
        angles = torch.view_as_real(turns)
        part_kernel[(d_k_rope.numel() // rope,)](
            d_query, d_key, d_value, angles, d_q, d_kv, d_k_rope, d_q.shape[1], **sizes, num_warps=WARPS
        )
    return d_q, d_kv, d_k_rope


def _sizes(heads: int, nope: int, rope: int, kv_width: int) -> dict[str, int]:
    """The kernels' constants."""
    v = kv_width - nope
    return {
        "NUM_HEADS": heads,
        "NOPE": nope,
        "ROPE": rope,
        "V": v,
        "NOPE_ROOM": triton.next_power_of_2(nope),
        "V_ROOM": triton.next_power_of_2(v),
        "HEADS": min(HEADS, triton.next_power_of_2(heads)),
    }
