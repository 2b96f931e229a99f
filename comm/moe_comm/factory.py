"""From a word in a config to a dispatcher."""

import logging
from typing import Any

import torch.distributed as dist

from moe_comm.alltoall import AllToAllDispatcher
from moe_comm.dispatcher import Dispatcher
from moe_comm.errors import CommError, PlacementError
from moe_comm.local import LocalDispatcher
from moe_comm.placement import Placement
from moe_comm.transport import Transport
from moe_comm.transport_torch import TorchTransport
from moe_comm.two_hop import TwoHopDispatcher, why_not_two_hop
from moe_comm.wire.codec import wire_pair

KINDS = ("auto", "local", "alltoall", "two_hop")
_log = logging.getLogger("moe_comm")


def open_dispatcher(
    kind: str,
    placement: Placement,
    group: Any = None,
    *,
    wire: str = "auto",
    chunks: int | None = None,
    max_rows: int | None = None,
    confirm: bool = True,
    keep_tiles: bool = False,
) -> Dispatcher:
    """Make a dispatcher; all ranks of the group call it together and alike.

    Args:
        kind: "local" (one rank), "alltoall", "two_hop" (several nodes of whole routing groups), or "auto":
            local for one rank, two_hop where it suits, else alltoall.
        placement: where experts live.
        group: the expert-parallel group: a process group of torch.distributed, a communicator of
            mpi4py, or any `Transport`; None is torch's default group. Not read by "local".
        wire: what rows are written as while they travel: auto (as they are), bf16, fp32, fp8, fp8_pow2.
            The FP8 forms hold for dispatch and for the backward of combine; what is summed goes as BF16.
        chunks: parts of a dispatch over two hops; None: a default. Read by "two_hop".
        max_rows: rows that a rank may send, pass on or receive in one dispatch; more is `ReceiveOverflow`
            on all ranks.
        confirm: ranks agree before combines and backwards too, as they must before a dispatch, so that one
            which calls another operation or refuses is told of on all. False saves a message's way there
            and back, for callers whose order of operations is fixed; never done for CUDA tensors.
        keep_tiles: what arrives in E4M3 stays so: the rows of a dispatch, and of the backward of a combine,
            are stand-ins that carry codes and scales (`wire/carried.py`), for experts that read those. With
            wire fp8_pow2 alone; "local" then writes rows so too, each token once.

    Raises:
        CommError: an unknown word, or one that does not suit the placement, the group or another word.
    """
    if kind not in KINDS:
        raise CommError(f"expected a dispatcher kind of {', '.join(KINDS)}, got {kind!r}")
    wire_pair(wire, keep_tiles)
    for name, value in (("chunks", chunks), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise CommError(f"expected {name} of at least 1, got {value}")
    if kind == "local" or (kind == "auto" and placement.ep_size == 1):
        return LocalDispatcher.for_placement(placement, max_rows, keep_tiles)
    if kind == "two_hop" and placement.ep_size == 1:
        raise PlacementError(f"two_hop: {why_not_two_hop(placement)}; use 'local'")
    if kind == "two_hop" or (kind == "auto" and _suits(placement)):
        return TwoHopDispatcher(placement, _transport(group), wire, max_rows, chunks, confirm, keep_tiles)
    return AllToAllDispatcher(placement, _transport(group), wire, max_rows, confirm, keep_tiles)


def _suits(placement: Placement) -> bool:
    """Whether `auto` takes two hops; says so where it does not."""
    reason = why_not_two_hop(placement)
    if reason is not None and placement.first_rank + placement.ep_rank == 0:
        _log.warning("auto takes the dispatcher alltoall: for two_hop %s", reason)
    return reason is None


def _transport(group: Any) -> Transport:
    """The transport over a group of either library."""
    if hasattr(group, "Ialltoallv"):
        from moe_comm.transport_mpi import MpiTransport  # needs mpi4py, which the caller has then

        return MpiTransport(group)
    if group is None or hasattr(group, "group_name"):
        return TorchTransport(group)
    if not hasattr(group, "all_to_all"):
        got = "a group without this rank" if group is dist.GroupMember.NON_GROUP_MEMBER else repr(group)
        raise PlacementError(f"expected a process group, an mpi4py communicator or a Transport, got {got}")
    return group
