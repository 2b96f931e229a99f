"""Dispatchers of every kind over process groups that are made once.

Opening a dispatcher makes process groups, which takes longer than a hundred exchanges of a test. Cases run
one after another, so all dispatchers of a world may share the groups of one `SharedGroups`.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from moe_comm.dispatcher import Dispatcher, Pending
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement
from moe_comm.transport import Transport
from moe_comm.transport_torch import TorchTransport
from torch import Tensor

from tests.unit.comm.plain_hops import Layout


class SharedGroups:
    """A transport whose parts are made once; for dispatchers that are not used at the same time.

    Args:
        transport: of a process group, gloo or MPI.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._parts: dict[tuple[int, ...], SharedGroups] = {}

    @property
    def size(self) -> int:
        return self._transport.size

    @property
    def rank(self) -> int:
        return self._transport.rank

    @property
    def device(self) -> torch.device:
        return self._transport.device

    def split(self, ranks: Sequence[int]) -> "SharedGroups":
        """See `Transport.split`."""
        key = tuple(ranks)
        if key not in self._parts:
            self._parts[key] = SharedGroups(self._transport.split(ranks))
        return self._parts[key]

    def close(self) -> None:
        """See `Transport.close`; the case is over for all who share it."""
        self._transport.close()

    def all_to_all(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        received: Tensor | None = None,
    ) -> Pending[Tensor]:
        """See `Transport.all_to_all`."""
        return self._transport.all_to_all(send, send_splits, recv_splits, received)


@dataclass(frozen=True)
class Setting:
    """How a dispatcher is opened.

    Args:
        kind: alltoall or two_hop.
        ranks_per_node: consecutive ranks of a machine.
        wire: what rows are written as.
        chunks: parts of a dispatch; None: the default.
        max_rows: rows that a rank may receive; None: any number.
        confirm: agree before combines and backwards too.
        keep_tiles: hand out what arrives in E4M3 as it is.
    """

    kind: str
    ranks_per_node: int
    wire: str = "auto"
    chunks: int | None = None
    max_rows: int | None = None
    confirm: bool = True
    keep_tiles: bool = False

    def open(self, num_experts: int, groups: Transport, **layout: int) -> Dispatcher:
        """The dispatcher, with further numbers of its placement; all ranks call it together."""
        layout = {"ranks_per_node": self.ranks_per_node} | layout
        placement = Placement(num_experts, groups.size, groups.rank, **layout)
        return open_dispatcher(
            self.kind,
            placement,
            groups,
            wire=self.wire,
            chunks=self.chunks,
            max_rows=self.max_rows,
            confirm=self.confirm,
            keep_tiles=self.keep_tiles,
        )

    def layout(self, num_experts: int, ranks: int) -> Layout:
        """The same for the plain loops."""
        return Layout(ranks, num_experts // ranks, self.ranks_per_node)

    def but(self, **changes: object) -> "Setting":
        """The same with changes."""
        return replace(self, **changes)  # type: ignore[arg-type]


def settings_for(world_size: int) -> Iterator[Setting]:
    """One hop, and two hops over nodes of every size that divides the world."""
    yield Setting("alltoall", max(world_size // 2, 1))
    for ranks_per_node in range(1, world_size):
        if world_size % ranks_per_node == 0:
            yield Setting("two_hop", ranks_per_node)


Case = Callable[[Setting, SharedGroups], None]


def run_each(cases: Mapping[str, Case], world_size: int) -> dict[str, str]:
    """Run cases, each with every setting, on this rank of a gloo world; what failed, by case.

    A case makes all its exchanges before it compares, so that a failed comparison leaves no rank waiting.
    """
    groups = SharedGroups(TorchTransport())
    failures = {}
    for name, case in cases.items():
        for setting in settings_for(world_size):
            try:
                case(setting, groups)
            except AssertionError:
                failures[name] = f"{setting}\n{traceback.format_exc()}"
    return failures
