"""Asks ranks what they are in, and reads whether one only waits for others.

A rank that waits is no culprit, however long it waits. Its marks do not tell: rows of an exchange are waited
for inside the phase that reads them. Its stack does. The innermost frame that is not of the standard library
is in a file that waits for other ranks, or the rank is busy with something of its own. One that waits for its
checkpoint to be written is as busy as the thread that writes it.
"""

import os
import re
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moe_runtime.parallel.beat import Beat

# Innermost frames of those who wait: collectives and stores, expert exchanges, boundary tensors.
_WAITS = re.compile(
    r"/torch/distributed/"
    r"|/moe_comm/(transport_\w+|mpi_\w+|lane|pending)\.py$"
    r"|/moe_runtime/parallel/(p2p|peers)\.py$"
)
_WRITER = "/moe_runtime/checkpoint/background.py"
_LIBRARY = re.compile(r"/python3\.\d+/(?!site-packages/)|^<")
_FRAME = re.compile(r'^  File "(.*)", line \d+ in ', re.MULTILINE)


def stacks_file(status_dir: Path, rank: int) -> Path:
    """Where a rank's stacks are written."""
    return status_dir / f"rank{rank}.stacks"


def ask_for_stacks(status_dir: Path, beats: Iterable[tuple[int, Beat]]) -> None:
    """Have ranks write their stacks, in place of older ones; one without a beat would die of the signal."""
    for rank, beat in beats:
        with suppress(OSError):
            os.truncate(stacks_file(status_dir, rank), 0)
            os.kill(beat.pid, signal.SIGUSR1)


def only_waits(stacks: str, thread: int) -> bool:
    """Whether a rank's own thread waits for other ranks, or for a thread of its own that does.

    Args:
        stacks: of all threads, as faulthandler writes them.
        thread: ident of the rank's own.
    """
    blocks = [block.partition("\n") for block in stacks.split("\n\n")]
    files = {head: _own_files(frames) for head, _, frames in blocks}
    own = next((found for head, found in files.items() if f"hread 0x{thread:016x} " in head), [])
    if own and own[0].endswith(_WRITER):  # it waits until a checkpoint is written
        others = (found for found in files.values() if found is not own and found[-1:] == own[:1])
        own = next(others, [])
    return bool(own) and _WAITS.search(own[0]) is not None


def _own_files(frames: str) -> list[str]:
    """The files of a stack that are not of the standard library, innermost first."""
    return [file for file in _FRAME.findall(frames) if not _LIBRARY.search(file)]
