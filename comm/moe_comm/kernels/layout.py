"""Send order from expert ids on a GPU: a counting sort whose result no thread timing can change.

    ids      | block 0 | block 1 | ...        256 slots a block, a slot is token * top_k + choice
    counts   [experts, blocks]                how often a block names an expert
    starts   exclusive running sum of counts, expert by expert, block by block within it:
             starts[e, b] is the row of the first slot of block b that chose e
    rank     of a slot among the earlier slots of its block with the same expert
    row      starts[e, b] + rank

Order is by expert, then slot, that is token, then choice: a stable sort, the one that
`routing.plan_send` makes. The only atomic additions are those of the histogram, on integers in shared
memory, where any order gives the same count; no position is ever drawn from a counter.

Bytes: at 8,192 tokens, top-8, 256 experts the ids are 0.5 MiB, counts 0.25 MiB, results 1.5 MiB, all
within L2, so this is three launches' worth of latency beside a permute that moves 1 GB. The rank is
found by comparing all pairs of a block, 17 million comparisons in all, a few microseconds on 132
multiprocessors; a one-hot running sum over experts would be as many additions and 256 times the
registers.

Nothing waits for the device: results have room for tokens * top_k rows, since how many of them are
used (choices of -1 use none) is known only there. `SlotLayout.trimmed` cuts them once the host knows.

Rejected: `torch.sort` (a radix sort of 64-bit keys: several passes, and the inverse one more);
positions by `atomic_add` (fast, but rows would change order from run to run).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_comm.errors import InputError

BLOCK_SLOTS = 256
COMPARED_SLOTS = 32  # compared with a block at a time: 32 flags a thread
LAYOUT_WARPS = BLOCK_SLOTS // 32  # a thread a slot, so that a rank is summed within one thread


@dataclass(frozen=True)
class SlotLayout:
    """How tokens become rows, for the ids of one rank. All tensors are on the device of the ids.

    Args:
        row_slots: int64 [capacity] slot of each row; -1 beyond the rows that exist.
        row_tokens: int64 [capacity] token of each row; -1 beyond the rows that exist.
        slot_rows: int64 [tokens, top_k] row of each slot; -1 where nothing was chosen.
        expert_counts: int64 [num_experts] rows of each expert.
        expert_offsets: int64 [num_experts + 1] first row of each expert, then the number of rows.
    """

    row_slots: Tensor
    row_tokens: Tensor
    slot_rows: Tensor
    expert_counts: Tensor
    expert_offsets: Tensor

    def trimmed(self, num_rows: int) -> "SlotLayout":
        """The same without the unused places at the end.

        Args:
            num_rows: `expert_offsets[-1]`, or the sum of counts the host already has.
        """
        return SlotLayout(
            self.row_slots[:num_rows],
            self.row_tokens[:num_rows],
            self.slot_rows,
            self.expert_counts,
            self.expert_offsets,
        )


@triton.jit
def count_experts_kernel(
    ids: tl.tensor,
    counts: tl.tensor,
    num_slots: int,
    num_experts: int,
    num_blocks: int,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """counts[e, b] = slots of block b that chose e."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids + slot, mask=slot < num_slots, other=-1).to(tl.int32)
    histogram = tl.histogram(expert, BINS, mask=expert >= 0)
    bins = tl.arange(0, BINS)
    tl.store(counts + bins * num_blocks + block, histogram, mask=bins < num_experts)


@triton.jit
def place_slots_kernel(
    ids: tl.tensor,
    starts: tl.tensor,
    row_slots: tl.tensor,
    row_tokens: tl.tensor,
    slot_rows: tl.tensor,
    num_slots: int,
    num_blocks: int,
    top_k: int,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
) -> None:
    """Row of each slot of a block, and the slot and the token of each of those rows."""
    block = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    slot = block * BLOCK + place
    is_slot = slot < num_slots
    expert = tl.load(ids + slot, mask=is_slot, other=-1).to(tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, COMPARED):
        other_place = first + tl.arange(0, COMPARED)
        other_slot = block * BLOCK + other_place
        other = tl.load(ids + other_slot, mask=other_slot < num_slots, other=-1).to(tl.int32)
        is_before = (other[None, :] == expert[:, None]) & (other_place[None, :] < place[:, None])
        rank += tl.sum(is_before.to(tl.int32), axis=1)
    is_row = is_slot & (expert >= 0)
    start = tl.load(starts + expert * num_blocks + block, mask=is_row, other=0)
    row = tl.where(is_row, start + rank, -1)
    tl.store(slot_rows + slot, row.to(tl.int64), mask=is_slot)
    tl.store(row_slots + row, slot.to(tl.int64), mask=is_row)
    tl.store(row_tokens + row, (slot // top_k).to(tl.int64), mask=is_row)


def plan_slots(expert_ids: Tensor, num_experts: int) -> SlotLayout:
    """Order rows by expert, then token, then choice, as `routing.plan_send` does.

    Args:
        expert_ids: int64 [tokens, top_k] in 0..num_experts-1, or -1 for no choice, on a CUDA device;
            at most 2^31 - 1 slots.
        num_experts: global number of experts.

    Returns:
        Index tensors with room for all slots; nothing waits for the device.

    Raises:
        InputError: expert_ids are not int64 [tokens, top_k].
    """
    if expert_ids.dim() != 2 or expert_ids.dtype != torch.int64:
        raise InputError(
            f"kernels: expected expert_ids int64 [tokens, top_k], got {expert_ids.dtype} "
            f"{list(expert_ids.shape)}"
        )
    ids = expert_ids.contiguous()
    num_slots = ids.numel()
    num_blocks = max(1, triton.cdiv(num_slots, BLOCK_SLOTS))
    counts = ids.new_empty((num_experts, num_blocks), dtype=torch.int32)
    count_experts_kernel[(num_blocks,)](
        ids,
        counts,
        num_slots,
        num_experts,
        num_blocks,
        BLOCK=BLOCK_SLOTS,
        BINS=histogram_bins(num_experts),
        num_warps=LAYOUT_WARPS,
    )
    # One exclusive sum, a zero in front: ends[i + 1] is the end of (expert, block) i and the start of i + 1.
    ends = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts.view(-1), 0, dtype=torch.int32, out=ends[1:])
    offsets = ends[::num_blocks].to(torch.int64)
    row_slots, row_tokens = ids.new_full((2, num_slots), -1)
    slot_rows = torch.empty_like(ids)
    if num_slots:
        place_slots_kernel[(num_blocks,)](
            ids,
            ends,
            row_slots,
            row_tokens,
            slot_rows,
            num_slots,
            num_blocks,
            ids.shape[1],
            BLOCK=BLOCK_SLOTS,
            COMPARED=COMPARED_SLOTS,
            num_warps=LAYOUT_WARPS,
        )
    return SlotLayout(row_slots, row_tokens, slot_rows, offsets.diff(), offsets)


def histogram_bins(num_experts: int) -> int:
    """Bins of the histogram: a power of two, at least one for each thread of a program."""
    return max(LAYOUT_WARPS * 32, 1 << (num_experts - 1).bit_length())
