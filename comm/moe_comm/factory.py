"""From a word in a config to a dispatcher."""

import torch.distributed as dist

from moe_comm.alltoall import AllToAllDispatcher
from moe_comm.errors import CommError
from moe_comm.local import LocalDispatcher
from moe_comm.placement import Placement
from moe_comm.transport_torch import TorchTransport

KINDS = ("auto", "local", "alltoall")


def open_dispatcher(
    kind: str, placement: Placement, group: dist.ProcessGroup | None = None
) -> LocalDispatcher | AllToAllDispatcher:
    """Make a dispatcher; all ranks of the group call it alike. Nothing is sent.

    Args:
        kind: "local" (one rank), "alltoall" (a process group), or "auto" (local for ep_size 1).
        placement: where experts live.
        group: the expert-parallel process group; None is the default group. Not read by "local".

    Raises:
        CommError: an unknown kind, or one that does not suit the placement or the group.
    """
    if kind not in KINDS:
        raise CommError(f"expected a dispatcher kind of {', '.join(KINDS)}, got {kind!r}")
    if kind == "local" or (kind == "auto" and placement.ep_size == 1):
        return LocalDispatcher.for_placement(placement)
    return AllToAllDispatcher(placement, TorchTransport(group))
