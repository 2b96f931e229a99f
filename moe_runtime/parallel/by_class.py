"""Sums over a rank's partitions, kept apart by class of parameter: gradient norms, and sizes of updates.

A partition is a flat vector in which parameters lie end to end, so what is of one class lies in runs. Sums of
squares go run by run: the norm of the whole gradient, which is needed anyway, is the sum of theirs.

The size of an update is rms(w' - w) / rms(w). To know it, weights from before the update are kept while it
runs: not all, for that would be four bytes a parameter, but of each piece of a parameter at most 2^14
elements, spread evenly. Whatever is smaller is taken whole.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.optim.classes import CLASSES, class_of
from moe_runtime.parallel.zero_partition import Partition

_WINDOW = 2**20  # elements converted to FP64 at a time
_SAMPLE = 2**14  # elements of a piece


@dataclass(frozen=True)
class Run:
    """Elements of one class that lie side by side in a partition.

    Args:
        row: place of the class in `CLASSES`.
        local: where it begins within the partition.
    """

    row: int
    local: int
    numel: int


def runs_of(partition: Partition, left_out: frozenset[str] = frozenset()) -> tuple[Run, ...]:
    """What this rank owns of a group; padding and the parameters of these names are left out."""
    runs: list[Run] = []
    for piece in partition.pieces():
        if piece.name in left_out:
            continue
        row, last = CLASSES.index(class_of(piece.name)), runs[-1] if runs else None
        if last is not None and last.row == row and last.local + last.numel == piece.local:
            runs[-1] = Run(row, last.local, last.numel + piece.numel)
        else:
            runs.append(Run(row, piece.local, piece.numel))
    return tuple(runs)


def add_squares(sums: Tensor, flat: Tensor, runs: Sequence[Run]) -> None:
    """Add the squares of the runs of a partition to float64 `sums` [classes]."""
    for run in runs:
        for window in flat.narrow(0, run.local, run.numel).split(_WINDOW):
            sums[run.row] += torch.linalg.vector_norm(window, dtype=torch.float64).square()


class UpdateSample:
    """Weights from before an update, and how far it moved them.

    Args:
        partitions: of this rank.
        left_out: names of parameters that another rank counts.

    Attributes:
        seconds: host time that sampling has taken.
    """

    def __init__(self, partitions: Iterable[Partition], left_out: frozenset[str] = frozenset()) -> None:
        begun = time.perf_counter()
        self._kept = [
            (CLASSES.index(class_of(piece.name)), live, live.clone())
            for partition in partitions
            for piece in partition.pieces()
            if piece.name not in left_out
            for live in (_spread(partition.master.detach().narrow(0, piece.local, piece.numel)),)
        ]
        self.seconds = time.perf_counter() - begun

    def sums(self, device: torch.device) -> Tensor:
        """float64 [2, classes]: squares of the updates, and of the weights from before."""
        begun = time.perf_counter()
        sums = torch.zeros(2, len(CLASSES), dtype=torch.float64, device=device)
        for row, live, before in self._kept:
            sums[0, row] += torch.linalg.vector_norm(live - before, dtype=torch.float64).square()
            sums[1, row] += torch.linalg.vector_norm(before, dtype=torch.float64).square()
        self.seconds += time.perf_counter() - begun
        return sums


def _spread(flat: Tensor) -> Tensor:
    """At most `_SAMPLE` elements of it, live; an odd distance, so that they are not all of one column."""
    step = -(-flat.numel() // _SAMPLE)
    return flat if step == 1 else flat[:: step | 1]
