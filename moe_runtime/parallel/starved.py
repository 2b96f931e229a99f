"""How long threads were ready to run and did not get a processor; 0 where the kernel does not say.

A machine with more work than processors makes everything late. The kernel counts that apart from what a
thread does and from what it waits for. So a late heartbeat is told apart from a locked interpreter, and a
rank whose processor is lent to another one from a rank that is slow.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path


def starved_s(pid: int, native_ids: Iterable[int]) -> float:
    """Seconds since their start, of the thread of another process that was starved most."""
    return max((_one(Path(f"/proc/{pid}/task/{thread}/schedstat")) for thread in native_ids), default=0.0)


def own_starvation(ranks_per_node: int) -> Callable[[], float]:
    """Gives a function that tells this thread's seconds since its start; about a microsecond a call.

    Args:
        ranks_per_node: where there is a processor for each of them the function gives 0.
    """
    if ranks_per_node <= len(os.sched_getaffinity(0)):
        return float
    try:
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return float
    return lambda: int(os.pread(file, 64, 0).split()[1]) / 1e9


def _one(file: Path) -> float:
    try:
        return int(file.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
