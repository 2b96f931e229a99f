"""What moves bytes: one collective, always asynchronous. A dispatcher knows nothing else of networks."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from moe_comm.dispatcher import Pending


class Transport(Protocol):
    """Exchanges rows between all ranks of one group.

    Nobody else uses its communicator. Several exchanges may be under way; all ranks start them in the
    same order, one thread at a time, and may wait for them in any order and from any thread.
    """

    @property
    def size(self) -> int:
        """Ranks of the group."""
        ...

    @property
    def rank(self) -> int:
        """This rank within the group."""
        ...

    @property
    def device(self) -> torch.device:
        """Where messages about the exchange live; rows may be on it, or on others that it can move."""
        ...

    def split(self, ranks: Sequence[int]) -> "Transport":
        """A transport among some ranks of this one; only those call it, all with the same list.

        Args:
            ranks: of this transport, ascending, this rank among them; rank i of the result is ranks[i].
        """
        ...

    def close(self) -> None:
        """Give up, from any thread: later exchanges are refused, and peers learn it as soon as may be."""
        ...

    def all_to_all(
        self,
        send: Tensor,
        send_splits: Sequence[int],
        recv_splits: Sequence[int],
        received: Tensor | None = None,
    ) -> Pending[Tensor]:
        """Start sending block d of `send` to rank d and receiving one block from each rank.

        Args:
            send: [rows, ...], contiguous; must not be written before the wait.
            send_splits: rows for each rank; sums to the rows of `send`.
            recv_splits: rows from each rank.
            received: [sum(recv_splits), ...] where to receive, with this rank's own block already in it;
                that of `send` is not read then. None: a new one.

        Returns:
            Pending [sum(recv_splits), ...], blocks in rank order.
        """
        ...
