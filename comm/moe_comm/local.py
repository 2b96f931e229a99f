"""The dispatcher of one process: all experts are here, so rows only change their order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.control import check_bound, require_own_handle
from moe_comm.dispatcher import Received, SharedByCopies
from moe_comm.errors import PlacementError
from moe_comm.pending import Started, at_once
from moe_comm.placement import Placement
from moe_comm.routing import SendPlan, check_kinds, check_rows, check_tokens, plan_unchecked
from moe_comm.traffic import TrafficMeter
from moe_comm.wire.codec import wire_pair


@dataclass(frozen=True)
class LocalHandle:
    """What a local combine needs.

    Args:
        plan: order of the rows.
        hidden: width of a row.
        origin: the dispatcher that gave it.
    """

    plan: SendPlan
    hidden: int
    origin: object


class LocalDispatcher(SharedByCopies):
    """Orders rows by expert without sending anything; needs no process group.

    Rows come in the order that `AllToAllDispatcher` on one rank gives, bit for bit.

    Args:
        num_experts: experts of a layer, all of them here.
        max_rows: rows that one dispatch may give; None: any number.
        keep_tiles: rows of a dispatch, and of the backward of a combine, are cast to E4M3 with scales that
            are powers of two, each token once, and handed out as stand-ins (`wire/carried.py`).
    """

    def __init__(self, num_experts: int, max_rows: int | None = None, keep_tiles: bool = False) -> None:
        self.placement = Placement(num_experts)
        self.max_rows = max_rows
        self._codec = wire_pair("fp8_pow2" if keep_tiles else "auto", keep_tiles)[0]
        self.traffic = TrafficMeter(self.placement)

    @classmethod
    def for_placement(
        cls, placement: Placement, max_rows: int | None = None, keep_tiles: bool = False
    ) -> "LocalDispatcher":
        """The dispatcher of a placement on one rank.

        Raises:
            PlacementError: it has more than one rank.
        """
        if placement.ep_size != 1:
            raise PlacementError(
                f"kind 'local' holds all experts on one rank, got ep_size {placement.ep_size}; use 'alltoall'"
            )
        return cls(placement.num_experts, max_rows, keep_tiles)

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Started[Received]:
        """See `Dispatcher.dispatch`. The wait raises:

        Raises:
            InputError: a wrong shape, dtype or expert number.
            ReceiveOverflow: more than max_rows rows.
        """
        return at_once(lambda: self._dispatch(tokens, weights, expert_ids))

    def combine(self, rows: Tensor, handle: LocalHandle) -> Started[Tensor]:
        """See `Dispatcher.combine`."""
        return at_once(lambda: self._combine(rows, handle))

    def combine_backward(self, d_tokens: Tensor, handle: LocalHandle) -> Started[Tensor]:
        """See `Dispatcher.combine_backward`."""
        return at_once(lambda: self._combine_backward(d_tokens, handle))

    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: LocalHandle
    ) -> Started[tuple[Tensor, Tensor]]:
        """See `Dispatcher.dispatch_backward`."""
        return at_once(lambda: self._dispatch_backward(d_rows, d_row_weights, handle))

    @torch.no_grad()
    def _dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Received:
        check_kinds(tokens, weights, expert_ids)
        plan, counts = plan_unchecked(expert_ids, self.placement.num_experts)
        check_bound(torch.tensor([[plan.row_slots.numel()]]), self.max_rows)
        rows = self._gather(tokens, plan)
        row_weights = weights.reshape(-1).index_select(0, plan.row_slots)
        self._count(rows.shape[0])
        handle = LocalHandle(plan, tokens.shape[1], self)
        return Received(rows, row_weights, counts, handle)

    @torch.no_grad()
    def _combine(self, rows: Tensor, handle: LocalHandle) -> Tensor:
        require_own_handle("combine", handle, self)
        check_rows(rows, handle.plan.row_slots.numel(), handle.hidden, "combine")
        self._count(rows.shape[0])
        return _sums_of(rows, handle.plan)

    @torch.no_grad()
    def _combine_backward(self, d_tokens: Tensor, handle: LocalHandle) -> Tensor:
        require_own_handle("combine_backward", handle, self)
        check_tokens(d_tokens, handle.plan.slot_rows.shape[0], handle.hidden)
        self._count(handle.plan.row_slots.numel())
        return self._gather(d_tokens, handle.plan)

    @torch.no_grad()
    def _dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: LocalHandle
    ) -> tuple[Tensor, Tensor]:
        require_own_handle("dispatch_backward", handle, self)
        plan = handle.plan
        check_rows(d_rows, plan.row_slots.numel(), handle.hidden, "dispatch_backward", d_row_weights)
        self._count(d_rows.shape[0])
        return _sums_of(d_rows, plan), plan.weights_of_slots(d_row_weights)

    def give_up(self, cause: BaseException) -> None:
        """See `Dispatcher.give_up`; nobody else is concerned."""

    def _gather(self, tokens: Tensor, plan: SendPlan) -> Tensor:
        """The token of each row, as the codec gives it: [rows, hidden]."""
        parts = [_rows_of(part, plan) for part in self._codec.encode(tokens)]
        return self._codec.decode(parts, tokens.dtype)

    def _count(self, num_rows: int) -> None:
        self.traffic.count_rows((num_rows,), 0, 0, (0,))


def _rows_of(values: Tensor, plan: SendPlan) -> Tensor:
    """Values [tokens, columns] of the token of each row."""
    if not values.is_cuda:
        return values.index_select(0, plan.row_tokens)
    from moe_comm.kernels.permute import permute_tokens  # brings triton

    rows = values.new_empty(plan.row_tokens.numel(), values.shape[1])
    return permute_tokens(values, plan.slot_rows, rows)


def _sums_of(rows: Tensor, plan: SendPlan) -> Tensor:
    """The sum of the rows of each token, in the order of its choices."""
    if not rows.is_cuda:
        return plan.bags.sum(rows)
    from moe_comm.kernels.unpermute import sum_rows  # brings triton

    return sum_rows(rows, plan.bags.indices, plan.bags.offsets)
