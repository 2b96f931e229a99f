"""A transport between threads of one process, for tests of what is said over a transport."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from moe_comm.pending import Started
from torch import Tensor


class ThreadTransport:
    """All-to-all between the threads of one group; see `Transport`."""

    def __init__(self, rank: int, desks: list[dict[tuple[int, int], Tensor]], barrier: threading.Barrier):
        self.rank, self.size = rank, len(desks)
        self.device = torch.device("cpu")
        self._desks, self._barrier = desks, barrier
        self._begun = 0

    def all_to_all(
        self, send: Tensor, send_splits: Sequence[int], recv_splits: Sequence[int]
    ) -> Started[Tensor]:
        """Puts a block on the desk of each rank; the wait takes what lies on one's own."""
        number, self._begun = self._begun, self._begun + 1
        for rank, block in enumerate(send.split(list(send_splits))):
            self._desks[rank][number, self.rank] = block.clone()

        def finish() -> Tensor:
            self._barrier.wait(timeout=10)
            received = torch.cat([self._desks[self.rank].pop((number, s)) for s in range(self.size)])
            assert received.shape[0] == sum(recv_splits)
            return received

        return Started(finish)

    def close(self) -> None:
        """Peers notice when they next wait."""
        self._barrier.abort()

    def split(self, ranks: Sequence[int]) -> "ThreadTransport":
        """The whole group again."""
        assert list(ranks) == list(range(self.size))
        return self


def run_threads(fn: Callable[[ThreadTransport], Any], size: int) -> list[Any]:
    """Call `fn(transport)` on every rank of a group of threads; results, or what was raised, by rank."""
    desks: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(size)]
    barrier = threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(fn, ThreadTransport(rank, desks, barrier)) for rank in range(size)]
        return [future.exception() or future.result() for future in futures]
