"""From a router's choice to the order in which rows travel: pure functions of indices, no messages.

Words. A *slot* is one (token, choice) pair, numbered token * top_k + choice. A *row* is the copy of a
token that one slot sends. A rank sends its rows by expert, then token; as experts lie contiguously on
ranks, that is also by destination, and each destination's rows are one contiguous block:

    slots   t0c0 t0c1 t1c0 t1c1 ...      expert_ids, flat
    send    | expert 0 | expert 1 |      a stable sort of the slots by expert
              to rank 0  to rank 1

What arrives is ordered by source rank, then expert, then token. Experts want all rows of one expert
together, so the receiver permutes blocks (source, expert) -> (expert, source): `regroup`.

Everything here is a gather by an index made once. Sums over the copies of a token gather too, in the
order of the choices ((c0 + c1) + c2) ..., never by scattered additions: the result does not depend on
thread timing, nor on how many ranks the experts are spread over.

Rejected: a one-hot [slots, experts] mask (the textbook form; 30 times the work of the sort),
`index_add_` (slower, and its order on a GPU is left to chance), `[tokens, top_k, hidden].sum(1)`
(writes all rows once more).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_comm.errors import CountMismatch, InputError

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_RADIX_LIMIT = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class SendPlan:
    """How one rank's tokens become rows.

    Args:
        row_slots: int64 [rows] slot of each row, in send order.
        row_tokens: int64 [rows] token of each row.
        slot_rows: int64 [tokens, top_k] row of each slot; inverse of row_slots.
        expert_counts: int64 [num_experts] rows for each global expert.
    """

    row_slots: Tensor
    row_tokens: Tensor
    slot_rows: Tensor
    expert_counts: Tensor


@dataclass(frozen=True)
class Regroup:
    """The permutation between the order of arrival (by source) and that of use (by expert).

    Args:
        to_expert: int64 [rows]; rows_by_expert = rows_by_source[to_expert].
        to_source: int64 [rows]; the inverse.
        row_counts: int64 [local_experts] on the CPU.
    """

    to_expert: Tensor
    to_source: Tensor
    row_counts: Tensor


def check_inputs(tokens: Tensor, weights: Tensor, expert_ids: Tensor, num_experts: int) -> None:
    """Refuse what cannot be dispatched.

    Args:
        tokens: [tokens, hidden] floating.
        weights: [tokens, top_k] floating.
        expert_ids: int64 [tokens, top_k] in 0..num_experts-1.
        num_experts: global number of experts.

    Raises:
        InputError: says which tensor, what was expected and what was got.
    """
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise InputError(f"dispatch: expected tokens [tokens, hidden], got shape {list(tokens.shape)}")
    if expert_ids.dim() != 2 or expert_ids.shape[0] != tokens.shape[0] or expert_ids.shape[1] < 1:
        raise InputError(
            f"dispatch: expected expert_ids [{tokens.shape[0]}, top_k], got shape {list(expert_ids.shape)}"
        )
    if weights.shape != expert_ids.shape:
        raise InputError(
            f"dispatch: expected weights {list(expert_ids.shape)} as expert_ids, got {list(weights.shape)}"
        )
    if expert_ids.dtype != torch.int64:
        raise InputError(f"dispatch: expected expert_ids of torch.int64, got {expert_ids.dtype}")
    for name, tensor in (("tokens", tokens), ("weights", weights)):
        if tensor.dtype not in _FLOATING:
            raise InputError(
                f"dispatch: expected {name} of a floating dtype of 16 to 64 bits, got {tensor.dtype}"
            )
    if expert_ids.numel():
        low, high = (int(bound) for bound in torch.aminmax(expert_ids))
        if low < 0 or high >= num_experts:
            raise InputError(
                f"dispatch: expected expert ids in 0..{num_experts - 1}, got {low if low < 0 else high}"
            )


def check_rows(
    rows: Tensor, num_rows: int, hidden: int, operation: str, row_weights: Tensor | None = None
) -> None:
    """Refuse rows that are not those of the handle.

    Raises:
        CountMismatch: says what the handle knows and what was got.
    """
    if rows.shape != (num_rows, hidden):
        raise CountMismatch(
            f"{operation}: expected rows {[num_rows, hidden]} as dispatched, got {list(rows.shape)}"
        )
    if row_weights is not None and row_weights.shape != (num_rows,):
        raise CountMismatch(
            f"{operation}: expected {num_rows} row weights as dispatched, got shape {list(row_weights.shape)}"
        )


def check_tokens(d_tokens: Tensor, plan: SendPlan, hidden: int) -> None:
    """Refuse gradients of other tokens than those of the handle.

    Raises:
        CountMismatch: says what the handle knows and what was got.
    """
    expected = [plan.slot_rows.shape[0], hidden]
    if list(d_tokens.shape) != expected:
        raise CountMismatch(
            f"combine_backward: expected gradients {expected} as combined, got {list(d_tokens.shape)}"
        )


def plan_send(expert_ids: Tensor, num_experts: int) -> SendPlan:
    """Order the rows of this rank by expert, then token.

    Args:
        expert_ids: int64 [tokens, top_k] in 0..num_experts-1.
        num_experts: global number of experts.

    Returns:
        Index tensors on the device of expert_ids.
    """
    flat = expert_ids.reshape(-1)
    top_k = expert_ids.shape[1]
    row_slots = _stable_order(flat, num_experts)
    return SendPlan(
        row_slots=row_slots,
        row_tokens=torch.div(row_slots, top_k, rounding_mode="floor"),
        slot_rows=_inverse(row_slots).view(expert_ids.shape),
        expert_counts=torch.bincount(flat, minlength=num_experts),
    )


def regroup(counts: Tensor, device: torch.device) -> Regroup:
    """Where each received row belongs once rows are ordered by expert.

    Args:
        counts: int64 [sources, local_experts] on the CPU: rows from each source for each expert.
        device: where the index tensors shall live.
    """
    lengths = counts.reshape(-1)
    source_starts = (lengths.cumsum(0) - lengths).view_as(counts)
    by_expert = counts.t().reshape(-1)
    expert_starts = (by_expert.cumsum(0) - by_expert).view(counts.t().shape).t()
    shift = source_starts - expert_starts  # [sources, local_experts]
    num_rows = int(lengths.sum())
    return Regroup(
        to_expert=_shifted_blocks(shift.t().reshape(-1), by_expert, num_rows, device),
        to_source=_shifted_blocks(-shift.reshape(-1), lengths, num_rows, device),
        row_counts=counts.sum(0),
    )


def sum_slots(rows: Tensor, slot_rows: Tensor) -> Tensor:
    """Sum the rows of each token over its choices, in order, in at least FP32; round once.

    Args:
        rows: [rows, hidden].
        slot_rows: int64 [tokens, top_k] row of each slot.

    Returns:
        [tokens, hidden] in the dtype of rows. Rounding of BF16 is to nearest; on a CPU an exact tie
        goes away from zero.
    """
    return F.embedding_bag(slot_rows, rows, mode="sum")


def _stable_order(flat: Tensor, num_experts: int) -> Tensor:
    """Stable argsort of expert numbers."""
    if flat.is_cuda or num_experts > _RADIX_LIMIT:
        return torch.argsort(flat, stable=True)
    # NumPy sorts 16-bit integers by radix, ten times as fast as torch does at these lengths.
    return torch.from_numpy(flat.to(torch.int16).numpy().argsort(kind="stable"))


def _inverse(permutation: Tensor) -> Tensor:
    positions = torch.arange(permutation.numel(), device=permutation.device)
    return torch.empty_like(permutation).scatter_(0, permutation, positions)


def _shifted_blocks(shift: Tensor, lengths: Tensor, num_rows: int, device: torch.device) -> Tensor:
    """0..num_rows-1, where the numbers of block b are moved by shift[b]."""
    moved = torch.repeat_interleave(shift.to(device), lengths.to(device), output_size=num_rows)
    return moved.add_(torch.arange(num_rows, device=device))
