"""Everybody in the race of exchanges, behind one face.

A contender brings tokens to imitated experts and sums what they give. What is timed is `dispatch` and
`combine`; between them `apply_experts` multiplies each row by its expert's factor.
"""

from typing import Protocol

import torch.distributed as dist
from moe_comm import Placement, open_dispatcher
from torch import Tensor

from moe_runtime.cli.bench_comm.peers import PlainExchange, RawExchange
from moe_runtime.cli.bench_comm.settings import Settings


class Contender(Protocol):
    """One way to exchange.

    Attributes:
        sums: whether `combine` gives the weighted sums [tokens, hidden].
    """

    sums: bool

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Rows of this rank's experts."""
        ...

    def apply_experts(self, rows: Tensor, factors: Tensor) -> Tensor:
        """Rows times their expert's factor, FP32 [local_experts], and the gate weight if it came along."""
        ...

    def combine(self, rows: Tensor) -> Tensor:
        """Bring rows back."""
        ...

    def sent_bytes(self) -> list[int]:
        """[within the node, to other nodes] since the last call."""
        ...


def open_contender(name: str, settings: Settings) -> Contender:
    """The contender of that name, for all routings.

    Args:
        name: one of CONTENDERS.
        settings: of the measurement.
    """
    if name == "plain":
        return Plain(settings)
    if name == "deepspeed":
        from moe_runtime.cli.bench_comm.deepspeed_peer import DeepSpeedExchange  # seconds to import

        return DeepSpeedExchange(settings)
    return Ours(name, settings)


class Plain:
    """The plain exchange."""

    sums = True

    def __init__(self, settings: Settings) -> None:
        self._peer = PlainExchange(settings.num_experts)
        self._settings = settings
        self._sent = [0, 0]

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        rows, self._counts = self._peer.dispatch(tokens, weights, expert_ids)
        told = self._settings.local_experts * 8
        self._count(self._peer.sent, rows, told)
        return rows

    def apply_experts(self, rows: Tensor, factors: Tensor) -> Tensor:
        return (rows * factors.repeat_interleave(self._counts).unsqueeze(1)).to(rows.dtype)

    def combine(self, rows: Tensor) -> Tensor:
        self._count(self._peer.received, rows, 0)
        return self._peer.combine(rows)

    def sent_bytes(self) -> list[int]:
        sent, self._sent = self._sent, [0, 0]
        return sent

    def _count(self, rows_to: list[int], rows: Tensor, told: int) -> None:
        row_bytes = rows.shape[1] * rows.element_size()
        self._sent = sent_to_others([number * row_bytes + told for number in rows_to], self._settings)


class Raw:
    """The floor for one routing, whose sizes it knows before it starts.

    Args:
        settings: of the measurement.
        expert_ids: int64 [tokens, top_k] of this rank.
    """

    sums = False

    def __init__(self, settings: Settings, expert_ids: Tensor) -> None:
        self._peer = RawExchange(expert_ids, settings.local_experts)

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        return self._peer.dispatch(tokens)

    def apply_experts(self, rows: Tensor, factors: Tensor) -> Tensor:
        return rows

    def combine(self, rows: Tensor) -> Tensor:
        return self._peer.combine(rows)

    def sent_bytes(self) -> list[int]:
        return [0, 0]


class Ours:
    """One of our dispatchers; its experts apply the gate weights.

    Args:
        name: kind and wire, as in CONTENDERS.
        settings: of the measurement.
    """

    sums = True

    def __init__(self, name: str, settings: Settings) -> None:
        kind = "two_hop" if name.startswith("two_hop") else "alltoall"
        per_node = settings.ranks_per_node
        groups = settings.num_groups
        placement = Placement(
            settings.num_experts, settings.world_size, dist.get_rank(), per_node, num_groups=groups
        )
        self._dispatcher = open_dispatcher(kind, placement, wire=name.removeprefix(f"{kind}_"))

    def dispatch(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        self._received = self._dispatcher.dispatch(tokens, weights, expert_ids).wait()
        return self._received.rows

    def apply_experts(self, rows: Tensor, factors: Tensor) -> Tensor:
        factor = factors.repeat_interleave(self._received.row_counts) * self._received.row_weights
        return (rows * factor.unsqueeze(1)).to(rows.dtype)

    def combine(self, rows: Tensor) -> Tensor:
        return self._dispatcher.combine(rows, self._received.handle).wait()

    def sent_bytes(self) -> list[int]:
        sent = self._dispatcher.traffic.snapshot(reset=True)
        return [sent.all_bytes_intra, sent.all_bytes_inter]


def sent_to_others(bytes_to: list[int], settings: Settings) -> list[int]:
    """Of what this rank sends every rank, [within the node, to other nodes]."""
    here, sent = dist.get_rank(), [0, 0]
    for rank, amount in enumerate(bytes_to):
        if rank != here:
            sent[settings.node_of(rank) != settings.node_of(here)] += amount
    return sent
