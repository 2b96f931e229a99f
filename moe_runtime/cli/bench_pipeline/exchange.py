"""The plain all-to-all that peers exchange tokens with, under ordinary autograd.

What most training code does: sort the (token, expert) copies by expert, tell counts, send every copy with
one `all_to_all_single`, group what arrives by expert; back the same way, then weigh and sum at the source.
Each step is waited for. Autograd sends gradients the same ways back, without counts.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Route:
    """How the copies of one layer's tokens lie, here and at their experts.

    Args:
        order: copies in the order in which they are sent, and its inverse.
        grouped: arrived rows in order of expert, and its inverse.
        sent: rows for each rank.
        received: rows from each rank.
        row_counts: int64 [local_experts].
    """

    order: tuple[Tensor, Tensor]
    grouped: tuple[Tensor, Tensor]
    sent: list[int]
    received: list[int]
    row_counts: Tensor


@dataclass
class PlainExchange:
    """Dispatch and combine by `all_to_all_single`.

    Args:
        num_experts: in all; they lie on the ranks in order, in equal parts.
        group: the expert-parallel group.
        sent_bytes: to other ranks, so far.
        wait_s: seconds spent in exchanges so far.
    """

    num_experts: int
    group: dist.ProcessGroup
    sent_bytes: int = field(default=0, init=False)
    wait_s: float = field(default=0.0, init=False)

    def restart(self) -> None:
        """Count from zero."""
        self.sent_bytes, self.wait_s = 0, 0.0

    def dispatch(self, tokens: Tensor, expert_ids: Tensor) -> tuple[Tensor, Route]:
        """Rows [rows, hidden] by local expert, and the way back.

        Args:
            tokens: [tokens, hidden].
            expert_ids: int64 [tokens, top_k].
        """
        flat = expert_ids.flatten()
        order = torch.argsort(flat, stable=True)
        route = self._route(torch.bincount(flat, minlength=self.num_experts), order)
        copies = tokens.unsqueeze(1).expand(-1, expert_ids.shape[1], -1).reshape(-1, tokens.shape[1])
        arrived = _AllToAll.apply(_Permute.apply(copies, *route.order), self, route.sent, route.received)
        return _Permute.apply(arrived, *route.grouped), route

    def combine(self, rows: Tensor, weights: Tensor, route: Route) -> Tensor:
        """Sum [tokens, hidden] of each token's rows, weighed by weights [tokens, top_k]."""
        by_source = _Permute.apply(rows, *reversed(route.grouped))
        back = _AllToAll.apply(by_source, self, route.received, route.sent)
        slots = _Permute.apply(back, *reversed(route.order)).view(*weights.shape, -1)
        return torch.bmm(weights.unsqueeze(1).to(slots.dtype), slots).squeeze(1)

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Rows from all ranks, one block from each."""
        out = rows.new_empty((sum(received), *rows.shape[1:]))
        begun = time.perf_counter()
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=self.group)
        self.wait_s += time.perf_counter() - begun
        others = sum(sent) - sent[self.group.rank()]
        self.sent_bytes += others * rows.element_size() * math.prod(rows.shape[1:])
        return out

    def _route(self, counts: Tensor, order: Tensor) -> Route:
        size = self.group.size()
        local = self.num_experts // size
        heard = self.exchange(counts, [local] * size, [local] * size).view(size, local)
        expert = torch.arange(local).repeat(size).repeat_interleave(heard.flatten())
        grouped = torch.argsort(expert, stable=True)
        return Route(
            order=(order, _inverse(order)),
            grouped=(grouped, _inverse(grouped)),
            sent=counts.view(size, local).sum(1).tolist(),
            received=heard.sum(1).tolist(),
            row_counts=heard.sum(0),
        )


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0]))


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, by: PlainExchange, sent: list[int], received: list[int]) -> Tensor:
        ctx.by, ctx.sent, ctx.received = by, sent, received
        return by.exchange(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.by.exchange(grad, ctx.received, ctx.sent), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; knowing the inverse, backward gathers, where autograd's own would add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.inverse = inverse
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad.index_select(0, ctx.inverse), None, None
