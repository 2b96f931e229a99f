"""The plain dispatcher across ranks: every row goes straight to the rank of its expert.

One dispatch is two collectives. The first carries counts (`control`) and is waited for at once, since
nobody can receive without knowing how much; it is small, its cost is one latency. The second carries
the rows, one message to each rank (`record`), and flies while the caller computes. Combine and both
backwards know the counts from the handle and are one collective each.

    dispatch            gather by send order -> all-to-all -> gather by expert
    combine             gather by source     -> all-to-all -> gather-and-sum per token
    combine_backward    as dispatch, with the handle
    dispatch_backward   as combine, with the handle; the gradients of the weights ride along

Dropless: a rank receives whatever it is sent, be it nothing or every row of all ranks. A token chosen
by several experts of one rank travels once for each of them. No condition on how experts are grouped.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.control import HEADER_SIZE, announce, announce_refusal, require_agreement
from moe_comm.dispatcher import Pending, Received
from moe_comm.errors import InputError, PlacementError
from moe_comm.pending import Started
from moe_comm.placement import Placement
from moe_comm.record import RecordLayout
from moe_comm.routing import (
    Regroup,
    SendPlan,
    check_inputs,
    check_rows,
    check_tokens,
    plan_send,
    regroup,
    sum_slots,
)
from moe_comm.traffic import TrafficMeter
from moe_comm.transport import Transport


@dataclass(frozen=True)
class AllToAllHandle:
    """Everything that combine and both backwards need; never changed, so it may be used any number of times.

    Args:
        plan: order of the rows sent.
        regroup: order of the rows received.
        sent: rows for each rank.
        received: rows from each rank.
        hidden: width of a row.
    """

    plan: SendPlan
    regroup: Regroup
    sent: tuple[int, ...]
    received: tuple[int, ...]
    hidden: int


class AllToAllDispatcher:
    """Sends rows with one all-to-all over the group.

    Args:
        placement: where experts live.
        transport: moves bytes between the ranks of the group.

    Raises:
        PlacementError: placement and transport are of different groups.

    Ref: DSV3 §3.2.2 (what is moved; not its two hops)
    """

    def __init__(self, placement: Placement, transport: Transport) -> None:
        if (transport.size, transport.rank) != (placement.ep_size, placement.ep_rank):
            raise PlacementError(
                f"expected a group of {placement.ep_size} with this rank at {placement.ep_rank}, "
                f"got a group of {transport.size} with this rank at {transport.rank}"
            )
        self.placement = placement
        self.traffic = TrafficMeter(placement)
        self._transport = transport

    @torch.no_grad()
    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Pending[Received]:
        """See `Dispatcher.dispatch`; returns once the counts are known, with the rows under way.

        Raises:
            InputError: on the rank whose input is wrong.
            RankDisagreement: on the others then, or on all if widths or dtypes differ.
            TransportError: the backend failed.
        """
        handle = self._open(tokens, weights, expert_ids)
        record = RecordLayout(((handle.hidden, tokens.dtype), (1, weights.dtype)))
        buffer = record.allocate(handle.plan.row_slots.numel(), tokens.device)
        torch.index_select(tokens, 0, handle.plan.row_tokens, out=record.field(buffer, 0))
        torch.index_select(weights.reshape(-1, 1), 0, handle.plan.row_slots, out=record.field(buffer, 1))
        pending = self._send(buffer, handle.sent, handle.received)

        def finish() -> Received:
            arrived = pending.wait()
            rows = record.field(arrived, 0).index_select(0, handle.regroup.to_expert)
            row_weights = record.field(arrived, 1).index_select(0, handle.regroup.to_expert).flatten()
            return Received(rows, row_weights, handle.regroup.row_counts, handle)

        return Started(finish)

    @torch.no_grad()
    def combine(self, rows: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        """See `Dispatcher.combine`; rows of one dtype on all ranks, which need not be that dispatched.

        Raises:
            CountMismatch: rows are not those of the handle.
            TransportError: the backend failed.
        """
        check_rows(rows, sum(handle.received), handle.hidden, "combine")
        pending = self._send(rows.index_select(0, handle.regroup.to_source), handle.received, handle.sent)
        return Started(lambda: sum_slots(pending.wait(), handle.plan.slot_rows))

    @torch.no_grad()
    def combine_backward(self, d_tokens: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        """See `Dispatcher.combine_backward`; errors as in `combine`."""
        check_tokens(d_tokens, handle.plan, handle.hidden)
        pending = self._send(d_tokens.index_select(0, handle.plan.row_tokens), handle.sent, handle.received)
        return Started(lambda: pending.wait().index_select(0, handle.regroup.to_expert))

    @torch.no_grad()
    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: AllToAllHandle
    ) -> Pending[tuple[Tensor, Tensor]]:
        """See `Dispatcher.dispatch_backward`; errors as in `combine`."""
        check_rows(d_rows, sum(handle.received), handle.hidden, "dispatch_backward", d_row_weights)
        record = RecordLayout(((handle.hidden, d_rows.dtype), (1, d_row_weights.dtype)))
        buffer = record.allocate(d_rows.shape[0], d_rows.device)
        to_source = handle.regroup.to_source
        torch.index_select(d_rows, 0, to_source, out=record.field(buffer, 0))
        torch.index_select(d_row_weights.unsqueeze(1), 0, to_source, out=record.field(buffer, 1))
        pending = self._send(buffer, handle.received, handle.sent)

        def finish() -> tuple[Tensor, Tensor]:
            arrived = pending.wait()
            slot_rows = handle.plan.slot_rows
            # The sum wants contiguous rows: summing whole records is cheaper than copying tokens out.
            d_tokens = sum_slots(record.whole(arrived), slot_rows)[:, : handle.hidden].contiguous()
            return d_tokens, record.field(arrived, 1).flatten()[slot_rows]

        return Started(finish)

    def _open(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> AllToAllHandle:
        """Plan what to send, tell the others, and learn what to receive."""
        ep_size, local_experts = self.placement.ep_size, self.placement.local_experts
        refusal: InputError | None = None
        try:
            check_inputs(tokens, weights, expert_ids, self.placement.num_experts)
            plan = plan_send(expert_ids, self.placement.num_experts)
            said = announce(tokens, weights, plan.expert_counts, ep_size)
        except InputError as error:
            refusal = error
            said = announce_refusal(ep_size, local_experts, tokens.device)
        ones = (1,) * ep_size
        self.traffic.count_control(said.shape[1] * said.element_size())
        heard = self._transport.all_to_all(said, ones, ones).wait()
        if refusal is not None:
            raise refusal
        said, heard = torch.stack((said, heard)).cpu()
        require_agreement(heard)
        sent, received = said[:, HEADER_SIZE:], heard[:, HEADER_SIZE:]
        return AllToAllHandle(
            plan=plan,
            regroup=regroup(received, tokens.device),
            sent=tuple(sent.sum(1).tolist()),
            received=tuple(received.sum(1).tolist()),
            hidden=tokens.shape[1],
        )

    def _send(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Pending[Tensor]:
        self.traffic.count_rows(sent, rows.shape[1] * rows.element_size())
        return self._transport.all_to_all(rows, sent, received)
