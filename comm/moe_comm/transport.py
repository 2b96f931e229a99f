"""What moves bytes: one collective, always asynchronous. A dispatcher knows nothing else of networks."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from moe_comm.dispatcher import Pending


class Transport(Protocol):
    """Exchanges rows between all ranks of one group.

    Several exchanges may be under way; all ranks start them in the same order, and may wait for them
    in any.
    """

    @property
    def size(self) -> int:
        """Ranks of the group."""
        ...

    @property
    def rank(self) -> int:
        """This rank within the group."""
        ...

    def all_to_all(
        self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]
    ) -> Pending[Tensor]:
        """Start sending block d of `send` to rank d and receiving one block from each rank.

        Args:
            send: [rows, ...], contiguous; must not be written before the wait.
            send_splits: rows for each rank; sums to the rows of `send`.
            recv_splits: rows from each rank.

        Returns:
            Pending [sum(recv_splits), ...], blocks in rank order.
        """
        ...
