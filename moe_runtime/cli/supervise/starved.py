"""How long threads of another process were ready to run and did not get a processor; Linux only.

A machine with more work than processors makes a heartbeat late. That is told apart from a locked interpreter:
a thread that waits for a processor is counted by the kernel, one that waits for a lock is not.
"""

from collections.abc import Iterable
from pathlib import Path


def starved_s(pid: int, native_ids: Iterable[int]) -> float:
    """Seconds since their start, of the thread that was starved most; 0 where the kernel does not say."""
    return max((_one(Path(f"/proc/{pid}/task/{thread}/schedstat")) for thread in native_ids), default=0.0)


def _one(file: Path) -> float:
    try:
        return int(file.read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
