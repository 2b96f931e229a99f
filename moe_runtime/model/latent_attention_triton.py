"""Attention of few queries to a latent cache on a GPU: one pass over the latents for all heads.

In the absorbed form every head of a text meets the same latents, and what it gathers are the latents again,
so heads are the rows of one tile and a block of latents, once in shared memory, is key and value of all of
them:

    scores = q_latent latent^T + q_rope rope^T        softmax        gathered = weights latent

New tokens of a text (drafts, or a piece of a prompt) are more rows of the same tile; each row has its own
last slot. A tile takes 64 rows, for the sums of 64 x 512 in FP32 fill half of the registers; the 128 heads of
DeepSeek-V3 are two tiles side by side, of which the second finds the latents in L2. For 128 heads the
arithmetic, 242 operations a byte, is as much of a bound as the memory; for 16 heads it is the memory alone.

Shared memory holds the queries and two blocks of 64 latents, which is nearly all there is. The two groups of
four warps of a program should share the work of both products. Triton gives each group all scores instead if
it sees that the second product is made of the first; it does not look through a branch, so the one that masks
slots, which only the last block of a text needs, also halves the work of the scores
(`test_no_product_is_done_twice`). For the same reason the two parts of the scores are scaled apart: a bare
sum would become one chain of products.

A long cache and few texts would leave most of the GPU idle, so programs share a text: each takes a stretch of
its slots and leaves its own softmax, and `join_kernel` weighs these by their sums. Stretches are of one
length for all texts, so that a short text costs what it holds; programs beyond its end leave at once.

The torch form (`latent_attention.gather`) is the oracle. It rounds nothing; here softmax weights are rounded
to the dtype of the latents before they meet them, so in BF16 results differ by up to 2^-8 of the largest
latent. Ref: DSV3 §2.1.1 (1)-(11)
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
JOINED = 4096  # numbers that a program of `join_kernel` holds
MOST_PARTS = 64


class Tile(NamedTuple):
    """Shape of a program of `attend_kernel`: slots that it reads at a time, warps, and loads in flight."""

    slots: int
    warps: int
    stages: int


ROWS = 64  # heads x queries of a program, fewer where a text has fewer
MANY, FEW = Tile(64, 8, 2), Tile(32, 4, 3)  # for 64 rows, and for fewer


@triton.jit
def soften(scores: tl.tensor, top: tl.tensor) -> Any:
    """Powers of scores [ROWS, SLOTS] below each row's new top, what the old sums shrink by, and that top."""
    higher = tl.maximum(top, tl.max(scores, axis=1))
    peak = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    return tl.exp2(scores - peak[:, None]), tl.exp2(top - peak), higher


@triton.jit
def hide(scores: tl.tensor, slot: tl.tensor, begin: tl.tensor, end: tl.tensor) -> Any:
    """-inf where a row does not look."""
    seen = (slot[None, :] >= begin[:, None]) & (slot[None, :] < end[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit(do_not_specialize=["first", "stop", "stretch", "num_queries"])
def attend_kernel(
    q_latent: tl.tensor,
    q_rope: tl.tensor,
    latents: tl.tensor,
    slots: tl.tensor,
    begins: tl.tensor,
    out: tl.tensor,
    log_sums: tl.tensor,
    first: int,
    stop: int,
    stretch: int,
    num_queries: int,
    latent_token: int,
    latent_head: int,
    rope_token: int,
    rope_head: int,
    cache_row: int,
    scale: float,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    BEGINS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """A tile of a text's rows (head by head, query by query) against a stretch of its slots."""
    tile, text, part = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row, rank, rope = tile * ROWS + tl.arange(0, ROWS), tl.arange(0, RANK), tl.arange(0, ROPE)
    is_row = row < num_queries * HEADS
    token, head = text * num_queries + row // HEADS, (row % HEADS).to(tl.int64)
    end = tl.minimum(tl.load(slots + token, mask=is_row, other=-1) + 1, stop).to(tl.int32)
    begin = tl.load(begins + token, mask=is_row, other=0) if BEGINS else tl.zeros_like(end)
    low = first + part * stretch
    high = tl.minimum(low + stretch, tl.max(end))
    unhidden = low if BEGINS else tl.min(tl.where(is_row, end, stop))  # all rows see the slots below
    at_latent = q_latent + token * latent_token + head * latent_head
    at_rope = q_rope + token * rope_token + head * rope_head
    wanted = tl.load(at_latent[:, None] + rank[None, :], mask=is_row[:, None], other=0.0)
    turned = tl.load(at_rope[:, None] + rope[None, :], mask=is_row[:, None], other=0.0)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    gathered = tl.zeros((ROWS, RANK), tl.float32)
    for start in range(low, high, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        place = (latents + text * cache_row + slot * (RANK + ROPE))[:, None]
        latent = tl.load(place + rank[None, :], mask=(slot < high)[:, None], other=0.0)
        key = tl.load(place + RANK + rope[None, :], mask=(slot < high)[:, None], other=0.0)
        scores = tl.dot(wanted, tl.trans(latent), input_precision="ieee") * scale
        scores += tl.dot(turned, tl.trans(key), input_precision="ieee") * scale
        if start + SLOTS > unhidden:
            scores = hide(scores, slot, begin, end)
        weights, kept, top = soften(scores, top)
        total = total * kept + tl.sum(weights, axis=1)
        gathered = tl.dot(weights.to(latent.dtype), latent, gathered * kept[:, None], input_precision="ieee")
    line = (part * tl.num_programs(1) + text) * num_queries * HEADS + row
    if SHARED:
        tl.store(log_sums + line, tl.where(total == 0.0, float("-inf"), top + tl.log2(total)), mask=is_row)
        is_row = is_row & (low < high)
    share = (gathered / tl.where(total == 0.0, 1.0, total)[:, None]).to(out.dtype.element_ty)
    tl.store(out + line[:, None] * RANK + rank[None, :], share, mask=is_row[:, None])


@triton.jit(do_not_specialize=["num_parts"])
def join_kernel(
    parts: tl.tensor,
    log_sums: tl.tensor,
    out: tl.tensor,
    num_parts: int,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Some columns of one row out of its parts, each weighed by the sum of its softmax."""
    line, lines = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    part = tl.arange(0, PARTS).to(tl.int64) * lines + line
    log_sum = tl.load(log_sums + part, mask=tl.arange(0, PARTS) < num_parts, other=float("-inf"))
    top = tl.max(log_sum)
    weight = tl.exp2(log_sum - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = parts + part[:, None] * RANK + column[None, :]
    held = tl.load(place, mask=(weight > 0.0)[:, None], other=0.0)
    joined = tl.sum(held * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + line * RANK + column, joined.to(out.dtype.element_ty))


def serves(latents: Tensor, rank: int) -> bool:
    """Whether the kernel takes such latents, [..., rank + rope]."""
    rope = latents.shape[-1] - rank
    fits = all(width >= 16 and width & (width - 1) == 0 for width in (rank, rope)) and rank <= 512
    return latents.is_cuda and latents.dtype in (torch.bfloat16, torch.float16) and fits


def attend(
    q_latent: Tensor,
    q_rope: Tensor,
    latents: Tensor,
    slots: Tensor,
    scale: float,
    first: int,
    stop: int,
    begins: Tensor | None = None,
    parts: int | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Softmax-weighted sums of latents.

    Args:
        q_latent: queries through the key's up-projection, [texts x new, heads, rank].
        q_rope: their rotary parts, [texts x new, heads, rope].
        latents: of one layer, [texts, slots, rank + rope]; rank and rope powers of two of at least 16.
        slots: int64 [texts, new], the last slot that each query sees.
        scale: of the scores.
        first, stop: nobody sees slots below `first` or from `stop` on.
        begins: int64 [texts, new], the first slot that each query sees; None: `first`.
        parts: programs that share a text; None: as many as the GPU is best filled by.
        tile: shape of a program; None: by the rows of a text.

    Returns:
        [texts x new, heads, rank] in the dtype of `q_latent`; zero where a query sees nothing.
    """
    (texts, new), (_, heads, rank) = slots.shape, q_latent.shape
    lines, out = new * heads, q_latent.new_empty(q_latent.shape)
    if not out.numel():
        return out
    rows = min(ROWS, max(16, triton.next_power_of_2(lines)))
    tile = tile or (MANY if rows == ROWS else FEW)
    tiles, blocks = triton.cdiv(lines, rows), max(triton.cdiv(stop - first, tile.slots), 1)
    parts = parts or best_parts(texts * tiles, blocks, _processors(out.device))
    stretch = triton.cdiv(blocks, parts) * tile.slots
    parts = triton.cdiv(blocks * tile.slots, stretch)
    shares = out if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)
    log_sums = shares if parts == 1 else shares.new_empty(parts, texts * lines)
    strides = *q_latent.stride()[:2], *q_rope.stride()[:2]
    sizes = {"HEADS": heads, "RANK": rank, "ROPE": q_rope.shape[2], "ROWS": rows, "SLOTS": tile.slots}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    tensors = q_latent, q_rope, latents, slots, slots if begins is None else begins, shares, log_sums
    numbers = first, stop, stretch, new, *strides, latents.stride(0), scale * LOG2_E
    flags = {"BEGINS": begins is not None, "SHARED": parts > 1}
    attend_kernel[(tiles, texts, parts)](*tensors, *numbers, **sizes, **flags, **options)
    if parts > 1:
        _join(shares, log_sums, out)
    return out


def _join(shares: Tensor, log_sums: Tensor, out: Tensor) -> None:
    """Weigh parts [parts, ..., rank] by the logarithms of their sums into out [..., rank]."""
    (parts, lines), rank = log_sums.shape, out.shape[-1]
    room = triton.next_power_of_2(parts)
    columns = min(rank, max(JOINED // room, 16))
    join_kernel[(lines, rank // columns)](
        shares, log_sums, out, parts, RANK=rank, PARTS=room, COLUMNS=columns, num_warps=4
    )


def best_parts(tiles: int, blocks: int, processors: int) -> int:
    """How many programs should share a text.

    A program takes as long as its blocks and one more to begin and end; programs run in waves of one a
    processor; and each part is written and read again, which takes the whole GPU a sixty-fourth of a block.

    Args:
        tiles: of all texts together.
        blocks: of latents in the longest text.
        processors: of the GPU.
    """

    def cost(parts: int) -> float:
        waves = -(-tiles * parts // processors)
        return waves * (-(-blocks // parts) + 1) + (tiles * parts / 64 if parts > 1 else 0)

    return min(range(1, min(blocks, MOST_PARTS) + 1), key=cost)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
