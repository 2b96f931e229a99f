"""What a message between two processes of this machine takes: there and back, halved."""

import statistics
import time

import torch
import torch.distributed as dist

SIZES = (1024, 256 * 1024, 1024 * 1024)
_TURNS = 15


def message_seconds(rank: int) -> dict[int, float]:
    """Median seconds of one message of each size in bytes, between ranks 0 and 1."""
    taken = {}
    for size in SIZES:
        block = torch.zeros(size, dtype=torch.uint8)
        turns = [_there_and_back(block, rank) / 2 for _ in range(_TURNS)]
        taken[size] = statistics.median(turns[3:])
    return taken


def _there_and_back(block: torch.Tensor, rank: int) -> float:
    begun = time.perf_counter()
    if rank == 0:
        dist.send(block, 1)
        dist.recv(block, 1)
    else:
        dist.recv(block, 0)
        dist.send(block, 0)
    return time.perf_counter() - begun
