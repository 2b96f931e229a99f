"""From a router's choice to the order in which rows travel: pure functions of indices, no messages.

Words. A *slot* is one (token, choice) pair, numbered token * top_k + choice. A *row* is the copy of a
token that one slot sends. A rank sends its rows by expert, then token; as experts lie contiguously on
ranks, that is also by destination, and each destination's rows are one contiguous block:

    slots   t0c0 t0c1 t1c0 t1c1 ...      expert_ids, flat
    send    | expert 0 | expert 1 |      a stable sort of the slots by expert
              to rank 0  to rank 1

What arrives is ordered by source rank, then expert, then token. Experts want all rows of one expert
together, so the receiver permutes blocks (source, expert) -> (expert, source): `regroup`.

A choice of -1 is none: its slot has no row.

Everything here is a gather by an index made once. Sums over the copies of a token gather too (`Bags`),
in the order of the choices ((c0 + c1) + c2) ..., never by scattered additions: the result does not
depend on thread timing, nor on how many ranks the experts are spread over.

Rejected: a one-hot [slots, experts] mask (the textbook form; 30 times the work of the sort),
`index_add_` (slower, and its order on a GPU is left to chance), `[tokens, top_k, hidden].sum(1)`
(writes all rows once more).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_comm.errors import CountMismatch, InputError

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_RADIX_LIMIT = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class Bags:
    """Which rows are summed into which result: bag b holds indices[offsets[b]:offsets[b + 1]], in order.

    Args:
        indices: int64 [entries].
        offsets: int64 [bags + 1].
    """

    indices: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, positions: Tensor, are_full: bool = False) -> "Bags":
        """One bag for each line.

        Args:
            positions: int64 [bags, at most]; -1 for none.
            are_full: the caller knows that there is no -1; a GPU need then not be waited for.
        """
        if are_full:
            bags, most = positions.shape
            offsets = torch.arange(bags + 1, device=positions.device) * most
            return cls(positions.flatten(), offsets)
        chosen = positions >= 0
        offsets = torch.zeros(positions.shape[0] + 1, dtype=torch.int64, device=positions.device)
        torch.cumsum(chosen.sum(1), 0, out=offsets[1:])
        return cls(positions[chosen], offsets)

    def sum(self, rows: Tensor) -> Tensor:
        """Sum the rows of each bag, in order, in at least FP32; round once. An empty bag gives zeros.

        Args:
            rows: [rows, hidden], contiguous.

        Returns:
            [bags, hidden] in the dtype of rows. Rounding of BF16 is to nearest; on a CPU an exact tie
            goes away from zero.
        """
        return F.embedding_bag(self.indices, rows, self.offsets, mode="sum", include_last_offset=True)


@dataclass(frozen=True)
class SendPlan:
    """How one rank's tokens become rows.

    Args:
        row_slots: int64 [rows] slot of each row, in send order.
        row_tokens: int64 [rows] token of each row.
        slot_rows: int64 [tokens, top_k] row of each slot, -1 where there is none; inverse of row_slots.
        expert_counts: int64 [num_experts] rows for each global expert.
        bags: the rows of each token, in the order of its choices.
    """

    row_slots: Tensor
    row_tokens: Tensor
    slot_rows: Tensor
    expert_counts: Tensor
    bags: Bags

    def weights_of_slots(self, row_weights: Tensor) -> Tensor:
        """Values of rows [rows] at their slots [tokens, top_k]; 0 where there is no row."""
        values = row_weights.new_zeros(self.slot_rows.numel())
        return values.scatter_(0, self.row_slots, row_weights).view(self.slot_rows.shape)


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
        expert_ids: int64 [tokens, top_k] in -1..num_experts-1; -1 is no choice.
        num_experts: global number of experts.

    Raises:
        InputError: says which tensor, what was expected and what was got.
    """
    check_kinds(tokens, weights, expert_ids)
    if expert_ids.numel():
        low, high = torch.stack(torch.aminmax(expert_ids)).tolist()
        _check_range(low, high, num_experts)


def check_kinds(tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> None:
    """`check_inputs` without a look at the numbers of experts, which on a GPU would have to be waited for."""
    named = {"tokens": tokens, "weights": weights, "expert_ids": expert_ids}
    _check_tensors("dispatch", named)
    if tokens.dim() != 2 or tokens.shape[1] < 1:
        raise InputError(f"dispatch: expected tokens [tokens, hidden >= 1], got shape {list(tokens.shape)}")
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
    _check_floating("dispatch", "tokens", tokens)
    _check_floating("dispatch", "weights", weights)


def _check_range(low: int, high: int, num_experts: int) -> None:
    if low < -1 or high >= num_experts:
        raise InputError(
            f"dispatch: expected expert ids in 0..{num_experts - 1} (or -1 for no choice), "
            f"got {low if low < -1 else high}"
        )


def check_rows(
    rows: Tensor, num_rows: int, hidden: int, operation: str, row_weights: Tensor | None = None
) -> None:
    """Refuse rows that are not those of the handle.

    Raises:
        CountMismatch: says what the handle knows and what was got.
        InputError: a dtype that cannot travel, or no tensor.
    """
    beside = {} if row_weights is None else {"row weights": row_weights}
    _check_tensors(operation, {"rows": rows, **beside})
    if rows.shape != (num_rows, hidden):
        raise CountMismatch(
            f"{operation}: expected rows {[num_rows, hidden]} as dispatched, got {list(rows.shape)}"
        )
    _check_floating(operation, "rows", rows)
    if row_weights is not None and row_weights.shape != (num_rows,):
        raise CountMismatch(
            f"{operation}: expected {num_rows} row weights as dispatched, got shape {list(row_weights.shape)}"
        )
    if row_weights is not None:
        _check_floating(operation, "row weights", row_weights)


def check_tokens(d_tokens: Tensor, num_tokens: int, hidden: int) -> None:
    """Refuse gradients of other tokens than those of the handle.

    Raises:
        CountMismatch: says what the handle knows and what was got.
        InputError: a dtype that cannot travel, or no tensor.
    """
    _check_tensors("combine_backward", {"gradients": d_tokens})
    expected = [num_tokens, hidden]
    if list(d_tokens.shape) != expected:
        raise CountMismatch(
            f"combine_backward: expected gradients {expected} as combined, got {list(d_tokens.shape)}"
        )
    _check_floating("combine_backward", "gradients", d_tokens)


def _check_tensors(operation: str, named: Mapping[str, Any]) -> None:
    """Refuse what holds no numbers here, and tensors that are not together."""
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise InputError(f"{operation}: expected {name} as a tensor, got {type(value).__name__}")
        if value.layout != torch.strided or value.is_meta:
            raise InputError(
                f"{operation}: expected {name} dense and in memory, got {value.layout} on {value.device}"
            )
    devices = {name: value.device for name, value in named.items()}
    if len(set(devices.values())) > 1:
        raise InputError(f"{operation}: expected tensors on one device, got {devices}")


def _check_floating(operation: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATING:
        raise InputError(
            f"{operation}: expected {name} of a floating dtype of 16 to 64 bits, got {tensor.dtype}"
        )


def plan_send(expert_ids: Tensor, num_experts: int) -> SendPlan:
    """Order the rows of this rank by expert, then token.

    Args:
        expert_ids: int64 [tokens, top_k] in -1..num_experts-1.
        num_experts: global number of experts.

    Returns:
        Index tensors on the device of expert_ids.
    """
    counts = _count(expert_ids, num_experts)
    return _plan(expert_ids, counts[1:], int(counts[0]))


def plan_unchecked(expert_ids: Tensor, num_experts: int) -> tuple[SendPlan, Tensor]:
    """As `check_inputs` and `plan_send` of ids that nobody has looked at; a GPU is waited for once.

    Returns:
        The plan, and its counts int64 [experts] on the CPU.

    Raises:
        InputError: an expert that there is not.
    """
    ids = expert_ids if expert_ids.numel() else expert_ids.new_zeros(1)
    counts = _count(expert_ids.clamp(-1, num_experts - 1), num_experts)
    low, high, not_chosen, *each = torch.cat((*map(torch.atleast_1d, torch.aminmax(ids)), counts)).tolist()
    _check_range(low, high, num_experts)
    return _plan(expert_ids, counts[1:], not_chosen), torch.tensor(each, dtype=torch.int64)


def _count(expert_ids: Tensor, num_experts: int) -> Tensor:
    """int64 [1 + experts]: how often there is no choice, and how often each expert."""
    flat = expert_ids.reshape(-1)
    return flat.new_zeros(num_experts + 1).scatter_add_(0, flat + 1, torch.ones_like(flat))


def _plan(expert_ids: Tensor, expert_counts: Tensor, not_chosen: int) -> SendPlan:
    flat, num_experts = expert_ids.reshape(-1), expert_counts.numel()
    # No choice sorts before all experts.
    row_slots = _stable_order(flat, num_experts)[not_chosen:]
    slot_rows = torch.full_like(flat, -1)
    slot_rows.scatter_(0, row_slots, torch.arange(row_slots.numel(), device=flat.device))
    slot_rows = slot_rows.view(expert_ids.shape)
    return SendPlan(
        row_slots=row_slots,
        row_tokens=torch.div(row_slots, expert_ids.shape[1], rounding_mode="floor"),
        slot_rows=slot_rows,
        expert_counts=expert_counts,
        bags=Bags.of(slot_rows, are_full=not_chosen == 0),
    )


def regroup(counts: Tensor, device: torch.device) -> Regroup:
    """Where each received row belongs once rows are ordered by expert.

    Args:
        counts: int64 [sources, local_experts] on the CPU: rows from each source for each expert.
        device: where the index tensors shall live.
    """
    to_expert, to_source = reorder_blocks(counts, (1, 0), device)
    return Regroup(to_expert, to_source, row_counts=counts.sum(0))


def reorder_blocks(lengths: Tensor, dims: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The permutation that puts blocks of rows in another order.

    Args:
        lengths: int64 [...] on the CPU: rows of each block; blocks lie in row-major order.
        dims: new order of the axes: blocks shall lie in row-major order of lengths.permute(dims).
        device: where the index tensors shall live.

    Returns:
        int64 [rows] each: (to_new, to_old) with new = old[to_new] and old = new[to_old].
    """
    moved = lengths.permute(*dims)
    shift = _starts(lengths).permute(*dims) - _starts(moved)
    back = [list(dims).index(axis) for axis in range(len(dims))]
    to_new = _shifted_blocks(shift.reshape(-1), moved.reshape(-1), device)
    to_old = _shifted_blocks(-shift.permute(*back).reshape(-1), lengths.reshape(-1), device)
    return to_new, to_old


def _starts(lengths: Tensor) -> Tensor:
    flat = lengths.reshape(-1)
    return (flat.cumsum(0) - flat).view(lengths.shape)


def _stable_order(flat: Tensor, num_experts: int) -> Tensor:
    """Stable argsort of expert numbers."""
    if flat.is_cuda or num_experts > _RADIX_LIMIT:
        return torch.argsort(flat, stable=True)
    # NumPy sorts 16-bit integers by radix, ten times as fast as torch does at these lengths.
    return torch.from_numpy(flat.to(torch.int16).numpy().argsort(kind="stable"))


def _shifted_blocks(shift: Tensor, lengths: Tensor, device: torch.device) -> Tensor:
    """0, 1, 2 ..., where the numbers of block b are moved by shift[b]."""
    num_rows = int(lengths.sum())
    moved = torch.repeat_interleave(shift.to(device), lengths.to(device), output_size=num_rows)
    return moved.add_(torch.arange(num_rows, device=device))
