"""The plain dispatcher across ranks: every row goes straight to the rank of its expert.

One dispatch is two collectives. The first carries counts (`control`), since nobody can receive without
knowing how much; the second carries the rows, one message to each rank (`record`). Combine and both
backwards know the counts from the handle. A `Lane` carries all this out while the caller computes.

    dispatch            gather by send order -> all-to-all -> gather by expert
    combine             gather by source     -> all-to-all -> gather-and-sum per token
    combine_backward    as dispatch, with the handle
    dispatch_backward   as combine, with the handle; the gradients of the weights ride along

Dropless: a rank receives whatever it is sent, be it nothing or every row of all ranks. A token chosen
by several experts of one rank travels once for each of them, so that the source alone sums a token's
rows, in the order of its choices: the result is that of one rank with all experts, bit for bit. No
condition on how experts are grouped.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor

from moe_comm.control import Control, Statement, agree_on_opening, check_bound, layout_facts
from moe_comm.dispatcher import Pending, Received, SharedByCopies
from moe_comm.lane import Breaker, Lane
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
)
from moe_comm.traffic import TrafficMeter
from moe_comm.transport import Transport
from moe_comm.wire.codec import WIRES, wire_pair


@dataclass(frozen=True)
class AllToAllHandle:
    """Everything that combine and both backwards need; never changed, so it may be used any number of times.

    Args:
        plan: order of the rows sent.
        regroup: order of the rows received.
        sent: rows for each rank.
        received: rows from each rank.
        hidden: width of a row.
        number: of the dispatch.
        origin: the `Control` of the dispatcher that gave it.
    """

    plan: SendPlan
    regroup: Regroup
    sent: tuple[int, ...]
    received: tuple[int, ...]
    hidden: int
    number: int
    origin: Control


class AllToAllDispatcher(SharedByCopies):
    """Sends rows with one all-to-all over the group; all ranks open it together.

    Args:
        placement: where experts live.
        transport: moves bytes between the ranks of the group.
        wire: what rows are written as while they travel, one of WIRES.
        max_rows: rows that a rank may send or receive in one dispatch; None: any number.
        confirm: as in `open_dispatcher`.
        keep_tiles: as in `open_dispatcher`.

    Raises:
        PlacementError: placement and transport are of different groups, or ranks opened it differently.

    Ref: DSV3 §3.2.2 (what is moved; not its two hops)
    """

    def __init__(
        self,
        placement: Placement,
        transport: Transport,
        wire: str = "auto",
        max_rows: int | None = None,
        confirm: bool = True,
        keep_tiles: bool = False,
    ) -> None:
        placement.require_group(transport.size, transport.rank)
        self.placement = placement
        self.max_rows = max_rows
        self.traffic = TrafficMeter(placement)
        self._dispatch_codec, self._combine_codec = wire_pair(wire, keep_tiles)
        self._transport = transport
        self._control = Control(transport, self.traffic, placement.ep_size + placement.local_experts, confirm)
        self._breaker = Breaker([transport])
        self._lane = Lane(f"alltoall {placement.ep_rank}", self._breaker)
        self._ranks = range(placement.ep_size)
        facts = layout_facts(placement) | {"kind": 1, "wire": WIRES.index(wire), "max_rows": max_rows or -1}
        facts["confirm"] = int(confirm)
        agree_on_opening(transport, facts)

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Pending[Received]:
        """See `Dispatcher.dispatch`. The wait raises:

        Raises:
            InputError: on the rank whose input is wrong.
            RankDisagreement: on the others then, or on all if widths, dtypes or operations differ.
            ReceiveOverflow: on all ranks, if one would send or receive more than max_rows.
            TransportError: the backend failed.
        """
        num_experts = self.placement.num_experts
        statement = self._control.state(
            "dispatch", tokens, weights, lambda: check_inputs(tokens, weights, expert_ids, num_experts)
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        plan, device = plan_send(expert_ids, num_experts), tokens.device

        def exchange() -> tuple[AllToAllHandle, RecordLayout, Pending[Tensor]]:
            handle = self._open(statement, plan, device)
            record = RecordLayout(self._dispatch_codec, handle.hidden, tokens.dtype, ((1, weights.dtype),))
            beside = [(weights.reshape(-1, 1), handle.plan.row_slots)]
            order = handle.plan.row_tokens
            return handle, record, self._send(record, tokens, order, beside, handle.sent, handle.received)

        job = self._lane.submit(exchange, device, (tokens, weights))

        def finish() -> Received:
            handle, record, pending = job.wait()
            arrived, to_expert = pending.wait(), handle.regroup.to_expert
            row_weights = record.extra(arrived, 0).index_select(0, to_expert).flatten()
            return Received(record.rows(arrived, to_expert), row_weights, handle.regroup.row_counts, handle)

        return Started(finish, (tokens, weights))

    def combine(self, rows: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        """See `Dispatcher.combine`; rows of one dtype on all ranks, which need not be that dispatched.

        Raises:
            CountMismatch: rows are not those of the handle.
            RankDisagreement: another rank's are not.
            TransportError: the backend failed.
        """
        statement = self._control.state(
            "combine",
            rows,
            None,
            lambda: check_rows(rows, sum(handle.received), handle.hidden, "combine"),
            handle,
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        record = RecordLayout(self._combine_codec, handle.hidden, rows.dtype)
        arrived = self._return(statement, rows, record, handle)
        return Started(lambda: _sum(record, arrived(), handle), (rows,))

    def combine_backward(self, d_tokens: Tensor, handle: AllToAllHandle) -> Pending[Tensor]:
        """See `Dispatcher.combine_backward`; errors as in `combine`."""
        statement = self._control.state(
            "combine_backward",
            d_tokens,
            None,
            lambda: check_tokens(d_tokens, handle.plan.slot_rows.shape[0], handle.hidden),
            handle,
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        record = RecordLayout(self._dispatch_codec, handle.hidden, d_tokens.dtype)

        def exchange() -> Pending[Tensor]:
            self._control.confirm(statement)
            return self._send(record, d_tokens, handle.plan.row_tokens, (), handle.sent, handle.received)

        job = self._lane.submit(exchange, d_tokens.device, (d_tokens,))
        return Started(lambda: record.rows(job.wait().wait(), handle.regroup.to_expert), (d_tokens,))

    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: AllToAllHandle
    ) -> Pending[tuple[Tensor, Tensor]]:
        """See `Dispatcher.dispatch_backward`; errors as in `combine`."""
        statement = self._control.state(
            "dispatch_backward",
            d_rows,
            d_row_weights,
            lambda: check_rows(
                d_rows, sum(handle.received), handle.hidden, "dispatch_backward", d_row_weights
            ),
            handle,
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        record = RecordLayout(self._combine_codec, handle.hidden, d_rows.dtype, ((1, d_row_weights.dtype),))
        arrived = self._return(statement, d_rows, record, handle, d_row_weights.unsqueeze(-1))

        def finish() -> tuple[Tensor, Tensor]:
            buffer = arrived()
            d_weights = handle.plan.weights_of_slots(record.extra(buffer, 0).flatten())
            return _sum(record, buffer, handle), d_weights

        return Started(finish, (d_rows, d_row_weights))

    def give_up(self, cause: BaseException) -> None:
        """See `Dispatcher.give_up`."""
        self._breaker.trip(cause)

    def _refuse(self, statement: Statement) -> Started[Never]:
        """Tell the others that this rank cannot take part; the wait raises why."""
        job = self._lane.submit(lambda: self._control.refuse(statement), self._transport.device)
        return Started(job.wait)

    def _open(self, statement: Statement, plan: SendPlan, device: torch.device) -> AllToAllHandle:
        """Tell the others what to expect, and learn what to receive."""
        size = self.placement.ep_size
        expert_counts = plan.expert_counts.view(size, -1)
        counts = torch.cat((expert_counts.sum(1).expand(size, size), expert_counts), dim=1)
        said, heard = self._control.agree(statement, counts)
        check_bound(heard[:, :size], self.max_rows)
        received = heard[:, size:]
        return AllToAllHandle(
            plan=plan,
            regroup=regroup(received, device),
            sent=tuple(said[0, :size].tolist()),
            received=tuple(received.sum(1).tolist()),
            hidden=statement.hidden,
            number=statement.number,
            origin=self._control,
        )

    def _return(
        self,
        statement: Statement,
        rows: Tensor,
        record: RecordLayout,
        handle: AllToAllHandle,
        beside: Tensor | None = None,
    ) -> Callable[[], Tensor]:
        """Start sending rows, and what belongs to them, back to where they came from."""

        def exchange() -> Pending[Tensor]:
            self._control.confirm(statement)
            to_source = handle.regroup.to_source
            extras = [] if beside is None else [(beside, to_source)]
            return self._send(record, rows, to_source, extras, handle.received, handle.sent)

        job = self._lane.submit(exchange, rows.device, (rows,) if beside is None else (rows, beside))
        return lambda: job.wait().wait()

    def _send(
        self,
        record: RecordLayout,
        rows: Tensor,
        order: Tensor,
        extras: Sequence[tuple[Tensor, Tensor]],
        sent: Sequence[int],
        received: Sequence[int],
    ) -> Pending[Tensor]:
        """Pack and start; what stays on this rank is written at once to where it would be received."""
        rank = self.placement.ep_rank
        first, place = sum(sent[:rank]), sum(received[:rank])
        arriving = record.allocate(sum(received), rows.device)
        own = (slice(first, first + sent[rank]), arriving[place : place + sent[rank]])
        buffer = record.pack(rows, order, extras, own)
        self.traffic.count_rows(sent, record.payload_bytes, record.meta_bytes, self._ranks)
        return self._transport.all_to_all(buffer, sent, received, arriving)


def _sum(record: RecordLayout, buffer: Tensor, handle: AllToAllHandle) -> Tensor:
    """Rows back at their source, summed per token: [tokens, hidden]."""
    total = handle.plan.bags.sum(record.summable(buffer))
    return total if total.shape[1] == handle.hidden else total[:, : handle.hidden].contiguous()
