"""Carries chunks of records over two hops and back, each hop on a lane of its own.

Every operation puts its tasks into both lanes at the moment of the call; tasks of one operation hand
chunks to each other. So each group sees its collectives in the order of the calls, and a chunk is on
the second hop while the next is on the first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Never

import torch
from torch import Tensor

from moe_comm.dispatcher import Pending
from moe_comm.hops import FanOut, Landing
from moe_comm.lane import Breaker, Job, Lane
from moe_comm.placement import Placement
from moe_comm.record import RecordLayout
from moe_comm.traffic import TrafficMeter
from moe_comm.transport import Transport


@dataclass(frozen=True)
class Route:
    """The two hops of one dispatch, chunk by chunk.

    Args:
        bounds: tokens [first, end) of each chunk.
        far: copies of the tokens of each chunk for every node.
        far_received: records from each node of this lane, by chunk.
        near_received: records from each rank of the node, by chunk.
        ending: int64 [ep_size, chunks] tokens that end here, by source.
        hidden: width of a row.
        near: copies of what the far hop brought for every rank of the node; added as it arrives.
    """

    bounds: list[tuple[int, int]]
    far: list[FanOut]
    far_received: list[tuple[int, ...]]
    near_received: list[tuple[int, ...]]
    ending: Tensor
    hidden: int
    near: list[FanOut] = field(default_factory=list)


class Journey:
    """The hops of one rank.

    Args:
        placement: nodes and lanes.
        transport: over the whole group; split here into the lane's and the node's.
        traffic: counts what is sent.
    """

    def __init__(self, placement: Placement, transport: Transport, traffic: TrafficMeter) -> None:
        lanes, rank = placement.lanes, placement.ep_rank
        self._traffic = traffic
        self._far_ranks = range(rank % lanes, placement.ep_size, lanes)
        self._near_ranks = range(rank // lanes * lanes, (rank // lanes + 1) * lanes)
        self._far, self._near = transport.split(self._far_ranks), transport.split(self._near_ranks)
        self.breaker = Breaker([transport, self._far, self._near])
        self._far_lane = Lane(f"far hop of {rank}", self.breaker)
        self._near_lane = Lane(f"near hop of {rank}", self.breaker)
        self._device = transport.device

    def refuse(self, refuse: Callable[[], Never]) -> Callable[[], Never]:
        """Take part in an agreement that fails on all ranks; what it raises is raised when waited for."""
        return self._far_lane.submit(refuse, self._device).wait

    def go_out(
        self,
        begin: Callable[[], Route],
        pack: Callable[[Route, int], Tensor],
        fan_out: Callable[[Route, Tensor, int], FanOut],
        record: RecordLayout,
        inputs: Sequence[Tensor],
    ) -> Callable[[], tuple[Route, Tensor]]:
        """Start sending tokens to the ranks of their experts.

        Args:
            begin: agrees with the other ranks; gives the route, or raises on all alike.
            pack: records of one chunk, in the order of the route's far copies.
            fan_out: near copies of the records of one chunk.
            record: layout of the records.
            inputs: the tokens, and what else `begin` and `pack` read.

        Returns:
            Waits, and gives the route and all records that ended here, by chunk.
        """

        def far() -> tuple[Route, list[Pending[Tensor]]]:
            route = begin()
            return route, [
                self._send_far(record, pack(route, chunk), route.far[chunk].counts, route.far_received[chunk])
                for chunk in range(len(route.bounds))
            ]

        def near() -> tuple[Route, list[Pending[Tensor]]]:
            route, crossing = far_job.wait()
            ending = []
            for chunk in range(len(crossing)):
                buffer = crossing[chunk].wait()
                copies = fan_out(route, buffer, chunk)
                buffer = buffer.index_select(0, copies.order)
                ending.append(self._send_near(record, buffer, copies.counts, route.near_received[chunk]))
            return route, ending

        device = inputs[0].device
        far_job = self._far_lane.submit(far, device, inputs)
        near_job = self._near_lane.submit(near, device)

        def arrive() -> tuple[Route, Tensor]:
            route, ending = near_job.wait()
            return route, torch.cat([pending.wait() for pending in ending])

        return arrive

    def come_back(
        self,
        confirm: Callable[[], None],
        rows: Tensor,
        row_weights: Tensor | None,
        record: RecordLayout,
        route: Route,
        landing: Landing,
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Start returning rows to their tokens, summed at each stop.

        Args:
            confirm: agrees with the other ranks, or raises on all alike.
            rows: [rows, hidden] of the experts of this rank.
            row_weights: [rows], which go to the slots that the rows came from.
            record: layout of the records.
            route: of the dispatch.
            landing: of the dispatch.

        Returns:
            Waits, and gives [tokens, hidden] and, with row_weights, [tokens, top_k].
        """
        device = rows.device

        def near() -> list[Pending[Tensor]]:
            agreed.wait()
            buffer = _sum_experts(record, rows, row_weights, landing)
            parts = buffer.split([sum(lengths) for lengths in route.near_received])
            return [
                self._send_near(record, part, lengths, copies.counts)
                for part, lengths, copies in zip(parts, route.near_received, route.near, strict=True)
            ]

        def summed(chunk: int) -> Tensor:
            sums = _sum_records(record, returning.wait()[chunk].wait(), route.near[chunk], route.hidden)
            return record.pack_all(*sums)

        def far() -> list[Pending[Tensor]]:
            return [
                self._send_far(record, job.wait(), route.far_received[chunk], route.far[chunk].counts)
                for chunk, job in enumerate(forwarded)
            ]

        agreed = self._far_lane.submit(confirm, device)
        returning = self._near_lane.submit(near, device, _present(rows, row_weights))
        forwarded: list[Job[Tensor]] = [
            self._near_lane.submit(lambda chunk=chunk: summed(chunk), device)  # type: ignore[misc]
            for chunk in range(len(route.bounds))
        ]
        crossing = self._far_lane.submit(far, device)

        def arrive() -> tuple[Tensor, Tensor | None]:
            chunks = [
                _sum_records(record, pending.wait(), copies, route.hidden)
                for pending, copies in zip(crossing.wait(), route.far, strict=True)
            ]
            tokens = torch.cat([part for part, _ in chunks])
            return tokens, None if row_weights is None else torch.cat([extras[0] for _, extras in chunks])

        return arrive

    def _send_far(
        self, record: RecordLayout, buffer: Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> Pending[Tensor]:
        self._traffic.count_rows(sent, record.payload_bytes, record.meta_bytes, self._far_ranks)
        return self._far.all_to_all(buffer, sent, received)

    def _send_near(
        self, record: RecordLayout, buffer: Tensor, sent: tuple[int, ...], received: tuple[int, ...]
    ) -> Pending[Tensor]:
        self._traffic.count_rows(sent, record.payload_bytes, record.meta_bytes, self._near_ranks)
        return self._near.all_to_all(buffer, sent, received)


def _present(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(tensor for tensor in tensors if tensor is not None)


def _sum_experts(record: RecordLayout, rows: Tensor, row_weights: Tensor | None, landing: Landing) -> Tensor:
    """Sum the rows of each record that had arrived here, in the order of arrival, as new records."""
    extras: tuple[Tensor, ...] = ()
    if row_weights is not None:
        extras = (landing.plan.weights_of_slots(row_weights).index_select(0, landing.from_arrival),)
    return record.pack_all(landing.bags.sum(rows), extras)


def _sum_records(
    record: RecordLayout, buffer: Tensor, copies: FanOut, hidden: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Sum what came back for each row: ([rows, hidden], what travelled beside, summed too)."""
    total = copies.bags.sum(record.summable(buffer))[:, :hidden]
    # Of the weights that came back for a token each is in one copy alone; the others have zeros there.
    extras = tuple(
        copies.bags.sum(record.extra(buffer, index).contiguous()) for index in range(record.num_extras)
    )
    return total.contiguous(), extras
