"""How far a rank's clock is ahead of rank 0's, so that spans of several machines lie on one time line.

Processes of one machine read one monotonic clock. Between machines rank 0 asks each rank for the time, some
times over; the answer that was soonest back counts, and is right to half its way there and back.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from moe_runtime.parallel.peers import Peers

_ROUNDS = 8
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def clock_ahead_s(peers: Peers, speakers: Sequence[int]) -> float:
    """Seconds that this rank's `time.perf_counter` is ahead of rank 0's; a collective call of all ranks.

    Args:
        speakers: ranks that want to know, alike everywhere; 0.0 for the others.
    """
    own = _BOOT.read_text().strip() if _BOOT.exists() else f"rank {peers.rank}"
    machines, ahead_s = peers.gather_json(own), 0.0
    for rank in speakers:
        if machines[rank] != machines[0] and peers.rank in (0, rank):
            ahead_s = min(_ask(peers, rank) for _ in range(_ROUNDS))[1]
    return ahead_s


def _ask(peers: Peers, rank: int) -> tuple[float, float]:
    """One question of rank 0 to a rank: (seconds there and back, seconds ahead) on the one asked."""
    times = torch.zeros(3, dtype=torch.float64)
    if peers.is_first:
        times[0] = time.perf_counter()
        dist.send(times, rank, group=peers.group)
        dist.recv(times, rank, group=peers.group)
        times[2] = time.perf_counter()
        dist.send(times, rank, group=peers.group)
        return 0.0, 0.0
    dist.recv(times, 0, group=peers.group)
    times[1] = time.perf_counter()
    dist.send(times, 0, group=peers.group)
    dist.recv(times, 0, group=peers.group)
    asked, answered, back = times.tolist()
    return back - asked, answered - (asked + back) / 2
