"""The dispatcher of one process: all experts are here, so rows only change their order."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_comm.dispatcher import Received
from moe_comm.errors import PlacementError
from moe_comm.pending import Done
from moe_comm.placement import Placement
from moe_comm.routing import SendPlan, check_inputs, check_rows, check_tokens, plan_send, sum_slots
from moe_comm.traffic import TrafficMeter


@dataclass(frozen=True)
class LocalHandle:
    """What a local combine needs.

    Args:
        plan: order of the rows.
        hidden: width of a row.
    """

    plan: SendPlan
    hidden: int


class LocalDispatcher:
    """Orders rows by expert without sending anything; needs no process group.

    Rows come in the order that `AllToAllDispatcher` on one rank gives, bit for bit.

    Args:
        num_experts: experts of a layer, all of them here.
    """

    def __init__(self, num_experts: int) -> None:
        self.placement = Placement(num_experts)
        self.traffic = TrafficMeter(self.placement)

    @classmethod
    def for_placement(cls, placement: Placement) -> "LocalDispatcher":
        """The dispatcher of a placement on one rank.

        Raises:
            PlacementError: it has more than one rank.
        """
        if placement.ep_size != 1:
            raise PlacementError(
                f"kind 'local' holds all experts on one rank, got ep_size {placement.ep_size}; use 'alltoall'"
            )
        return cls(placement.num_experts)

    @torch.no_grad()
    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Done[Received]:
        """See `Dispatcher.dispatch`.

        Raises:
            InputError: a wrong shape, dtype or expert number.
        """
        check_inputs(tokens, weights, expert_ids, self.placement.num_experts)
        plan = plan_send(expert_ids, self.placement.num_experts)
        rows = tokens.index_select(0, plan.row_tokens)
        row_weights = weights.reshape(-1).index_select(0, plan.row_slots)
        self.traffic.count_rows((rows.shape[0],), 0)
        handle = LocalHandle(plan, tokens.shape[1])
        return Done(Received(rows, row_weights, plan.expert_counts.cpu(), handle))

    @torch.no_grad()
    def combine(self, rows: Tensor, handle: LocalHandle) -> Done[Tensor]:
        """See `Dispatcher.combine`."""
        check_rows(rows, handle.plan.row_slots.numel(), handle.hidden, "combine")
        self.traffic.count_rows((rows.shape[0],), 0)
        return Done(sum_slots(rows, handle.plan.slot_rows))

    @torch.no_grad()
    def combine_backward(self, d_tokens: Tensor, handle: LocalHandle) -> Done[Tensor]:
        """See `Dispatcher.combine_backward`."""
        check_tokens(d_tokens, handle.plan, handle.hidden)
        self.traffic.count_rows((handle.plan.row_slots.numel(),), 0)
        return Done(d_tokens.index_select(0, handle.plan.row_tokens))

    @torch.no_grad()
    def dispatch_backward(
        self, d_rows: Tensor, d_row_weights: Tensor, handle: LocalHandle
    ) -> Done[tuple[Tensor, Tensor]]:
        """See `Dispatcher.dispatch_backward`."""
        plan = handle.plan
        check_rows(d_rows, plan.row_slots.numel(), handle.hidden, "dispatch_backward", d_row_weights)
        self.traffic.count_rows((d_rows.shape[0],), 0)
        return Done((sum_slots(d_rows, plan.slot_rows), d_row_weights[plan.slot_rows]))
