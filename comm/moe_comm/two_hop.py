"""The dispatcher for several nodes: a token crosses to a node once, however many of its experts live there.

Links between nodes are several times slower than those within. So a token takes two hops: over the
slow link to the rank of that node which has the same place in it as the source has in its own (a
*lane*), and from there to the ranks that hold its experts. Within the node, too, it goes to a rank
once. On the way back each rank sums over its experts, the forwarding rank over the ranks of the node,
the source over the nodes: one row a node crosses the slow link. Gate weights are applied at the expert,
before any of these sums. `hops` has the picture and the index work.

    bytes of `alltoall` between nodes     tokens x experts elsewhere
    bytes of `two_hop`                    tokens x nodes elsewhere, and expert ids and weights beside them

One exchange of counts (`control`) tells every rank all sizes of both hops. A hop has a `Lane` of its
own, and a dispatch goes in chunks: the near hop of one runs while the far hop of the next does.

    far lane     counts | chunk 0 | chunk 1 | ...              chunk 0 | chunk 1 | ...
    near lane            --> chunk 0 | chunk 1 | ...    back:  chunk 0 | chunk 1 | ...  -->

Rows are written by the wire codec once, at the source; forwarding copies bytes. Sums are made in at
least FP32 and rounded once for each hop, so the result is that of `alltoall` up to rounding, the same
from run to run. Groups of experts must not straddle nodes, for then routing limited to a few groups
would not be limited to as few nodes.

Rejected: sending to every destination rank straight and once (a node of 8 ranks gets the token up to 8
times over the slow link); a forwarding rank chosen by load (needs another exchange; the order of rows
would depend on it).

Ref: DSV3 §3.2.2
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Never

import torch
from torch import Tensor

from moe_comm.control import Control, Statement, agree_on_opening, check_bound, layout_facts
from moe_comm.dispatcher import Pending, Received, SharedByCopies
from moe_comm.errors import PlacementError
from moe_comm.hops import (
    FanOut,
    Landing,
    chosen_parts,
    chunk_bounds,
    counts_for_all,
    land,
    lengths_from_lanes,
    lengths_from_nodes,
)
from moe_comm.journey import Journey, Route
from moe_comm.pending import Started
from moe_comm.placement import Placement
from moe_comm.record import RecordLayout
from moe_comm.routing import check_inputs, check_rows, check_tokens
from moe_comm.traffic import TrafficMeter
from moe_comm.transport import Transport
from moe_comm.wire.carried import carry_part
from moe_comm.wire.codec import WIRES, wire_pair

DEFAULT_CHUNKS = 4
_SHORT_IDS = torch.iinfo(torch.int16).max


@dataclass(frozen=True)
class TwoHopHandle:
    """Everything that combine and both backwards need; serves any number of them.

    Args:
        route: the hops of the dispatch.
        landing: order and sums at this rank's experts.
        number: of the dispatch.
        origin: the `Control` of the dispatcher that gave it.
    """

    route: Route
    landing: Landing
    number: int
    origin: Control

    @property
    def num_rows(self) -> int:
        """Rows that were dispatched to this rank's experts."""
        return self.landing.to_expert.numel()


class TwoHopDispatcher(SharedByCopies):
    """Sends each token to a node once, and within the node to a rank once; all ranks open it together.

    Args:
        placement: where experts and nodes are; at least two nodes, each of whole groups.
        transport: moves bytes between the ranks of the group.
        wire: what rows are written as while they travel, one of WIRES.
        max_rows: rows that a rank may send, pass on or receive in one dispatch; None: any number.
        chunks: parts of a dispatch, equal on all ranks; None takes DEFAULT_CHUNKS.
        confirm: as in `open_dispatcher`.
        keep_tiles: as in `open_dispatcher`.

    Raises:
        PlacementError: the placement does not suit, or ranks opened it differently.

    Ref: DSV3 §3.2.2
    """

    def __init__(
        self,
        placement: Placement,
        transport: Transport,
        wire: str = "auto",
        max_rows: int | None = None,
        chunks: int | None = None,
        confirm: bool = True,
        keep_tiles: bool = False,
    ) -> None:
        placement.require_group(transport.size, transport.rank)
        self.placement = placement
        self.max_rows = max_rows
        self.lanes = placement.lanes
        self.traffic = TrafficMeter(placement)
        self._chunks = DEFAULT_CHUNKS if chunks is None else chunks
        self._dispatch_codec, self._combine_codec = wire_pair(wire, keep_tiles)
        facts = layout_facts(placement) | {"kind": 2, "wire": WIRES.index(wire), "max_rows": max_rows or -1}
        facts["confirm"] = int(confirm)
        agree_on_opening(transport, facts | {"chunks": self._chunks})
        # Only now, when all ranks are known to have this layout, do they all refuse it alike.
        reason = why_not_two_hop(placement)
        if reason is not None:
            raise PlacementError(f"two_hop: {reason}; use 'alltoall'")
        self._control = Control(transport, self.traffic, placement.ep_size + 2 * self._chunks, confirm)
        self._journey = Journey(placement, transport, self.traffic)
        is_short = placement.num_experts <= _SHORT_IDS
        self._id_dtype = torch.int16 if is_short else torch.int32

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Pending[Received]:
        """See `Dispatcher.dispatch`; the wait raises what that of `AllToAllDispatcher` does."""
        num_experts = self.placement.num_experts
        statement = self._control.state(
            "dispatch", tokens, weights, lambda: check_inputs(tokens, weights, expert_ids, num_experts)
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        expert_ids = expert_ids.clone()  # they decide on counts first and on rows later
        beside = ((expert_ids.shape[1], self._id_dtype), (expert_ids.shape[1], weights.dtype))
        record = RecordLayout(self._dispatch_codec, tokens.shape[1], tokens.dtype, beside)

        def pack(route: Route, chunk: int) -> Tensor:
            part, order = slice(*route.bounds[chunk]), route.far[chunk].order
            ids = expert_ids[part].to(self._id_dtype)
            chunk_rows = carry_part(tokens, tokens[part], part)
            return record.pack(chunk_rows, order, [(ids, order), (weights[part], order)])

        def fan_out(route: Route, buffer: Tensor, _: int) -> FanOut:
            route.near.append(FanOut.of(self._ranks_of(record.extra(buffer, 0))))
            return route.near[-1]

        arrive = self._journey.go_out(
            lambda: self._open(statement, expert_ids), pack, fan_out, record, (tokens, weights, expert_ids)
        )

        def finish() -> Received:
            route, arrived = arrive()
            landing = land(record.extra(arrived, 0), route.ending, self.placement)
            rows = record.rows(arrived, landing.to_expert)
            arrived_weights = record.extra(arrived, 1).index_select(0, landing.to_expert)
            choice = landing.plan.row_slots.remainder(arrived_weights.shape[1]).unsqueeze(1)
            row_weights = arrived_weights.gather(1, choice).flatten()
            handle = TwoHopHandle(route, landing, statement.number, self._control)
            return Received(rows, row_weights, landing.plan.expert_counts.cpu(), handle)

        return Started(finish, (tokens, weights))

    def combine(self, rows: Tensor, handle: TwoHopHandle) -> Pending[Tensor]:
        """See `Dispatcher.combine`; errors as in `AllToAllDispatcher.combine`."""
        statement = self._control.state(
            "combine",
            rows,
            None,
            lambda: check_rows(rows, handle.num_rows, handle.route.hidden, "combine"),
            handle,
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        record = RecordLayout(self._combine_codec, handle.route.hidden, rows.dtype)
        arrive = self._return(statement, rows, None, record, handle)
        return Started(lambda: arrive()[0], (rows,))

    def combine_backward(self, d_tokens: Tensor, handle: TwoHopHandle) -> Pending[Tensor]:
        """See `Dispatcher.combine_backward`; errors as in `combine`."""
        statement = self._control.state(
            "combine_backward",
            d_tokens,
            None,
            lambda: check_tokens(d_tokens, handle.route.bounds[-1][1], handle.route.hidden),
            handle,
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        record = RecordLayout(self._dispatch_codec, handle.route.hidden, d_tokens.dtype)

        def confirm() -> Route:
            self._control.confirm(statement)
            return handle.route

        def pack(route: Route, chunk: int) -> Tensor:
            part = slice(*route.bounds[chunk])
            return record.pack(carry_part(d_tokens, d_tokens[part], part), route.far[chunk].order)

        arrive = self._journey.go_out(
            confirm, pack, lambda route, _, chunk: route.near[chunk], record, (d_tokens,)
        )
        return Started(lambda: record.rows(arrive()[1], handle.landing.to_expert), (d_tokens,))

    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: TwoHopHandle
    ) -> Pending[tuple[Tensor, Tensor]]:
        """See `Dispatcher.dispatch_backward`; errors as in `combine`."""
        statement = self._control.state(
            "dispatch_backward",
            d_rows,
            d_row_weights,
            lambda: check_rows(
                d_rows, handle.num_rows, handle.route.hidden, "dispatch_backward", d_row_weights
            ),
            handle,
        )
        if statement.refusal is not None:
            return self._refuse(statement)
        hidden, top_k = handle.route.hidden, handle.landing.plan.slot_rows.shape[1]
        record = RecordLayout(self._combine_codec, hidden, d_rows.dtype, ((top_k, d_row_weights.dtype),))
        arrive = self._return(statement, d_rows, d_row_weights, record, handle)

        def finish() -> tuple[Tensor, Tensor]:
            d_tokens, d_weights = arrive()
            assert d_weights is not None
            return d_tokens, d_weights

        return Started(finish, (d_rows, d_row_weights))

    def give_up(self, cause: BaseException) -> None:
        """See `Dispatcher.give_up`."""
        self._journey.breaker.trip(cause)

    def _refuse(self, statement: Statement) -> Started[Never]:
        """Tell the others that this rank cannot take part; the wait raises why."""
        return Started(self._journey.refuse(lambda: self._control.refuse(statement)))

    def _open(self, statement: Statement, expert_ids: Tensor) -> Route:
        """Tell the others what to expect, and learn what to receive."""
        placement, size, chunks = self.placement, self.placement.ep_size, self._chunks
        _, heard = self._control.agree(statement, counts_for_all(expert_ids, placement, chunks))
        check_bound(heard[:, :size], self.max_rows, self.lanes)
        ending, crossing = heard[:, size : size + chunks], heard[:, size + chunks :]
        bounds = chunk_bounds(expert_ids.shape[0], chunks)
        experts = placement.local_experts * placement.lanes
        to_node = chosen_parts(expert_ids, 0, experts, placement.num_nodes)
        return Route(
            bounds=bounds,
            far=[FanOut.of(to_node[first:end]) for first, end in bounds],
            far_received=[lengths_from_nodes(crossing, placement, chunk) for chunk in range(chunks)],
            near_received=[lengths_from_lanes(ending, placement, chunk) for chunk in range(chunks)],
            ending=ending,
            hidden=statement.hidden,
        )

    def _ranks_of(self, expert_ids: Tensor) -> Tensor:
        """Which ranks of this node records go to: bool [records, lanes]."""
        experts, lanes = self.placement.local_experts, self.placement.lanes
        first_rank = self.placement.ep_rank // lanes * lanes
        return chosen_parts(expert_ids, first_rank * experts, experts, lanes)

    def _return(
        self,
        statement: Statement,
        rows: Tensor,
        row_weights: Tensor | None,
        record: RecordLayout,
        handle: TwoHopHandle,
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        def confirm() -> None:
            self._control.confirm(statement)

        return self._journey.come_back(confirm, rows, row_weights, record, handle.route, handle.landing)


def why_not_two_hop(placement: Placement) -> str | None:
    """Why `two_hop` does not suit a placement, in words; None if it does."""
    nodes, groups = placement.num_nodes, placement.num_groups
    if nodes < 2:
        return f"expected a group of at least 2 nodes, got {placement.ep_size} ranks on one node"
    if not placement.has_whole_nodes:
        return (
            f"expected a group of whole nodes, got {placement.ep_size} ranks from global rank "
            f"{placement.first_rank} with {placement.ranks_per_node} on each node"
        )
    if groups is not None and groups % nodes:
        return f"expected whole routing groups on each node, got {groups} groups on {nodes} nodes"
    return None
