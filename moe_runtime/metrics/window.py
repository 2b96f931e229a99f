"""The last steps of a process: what one step alone is too noisy to tell."""

import math
from collections import deque
from statistics import median

import torch
from torch import Tensor


class TimeWindow:
    """Durations of the last steps.

    Args:
        size: steps that are kept.
    """

    def __init__(self, size: int) -> None:
        self._seconds: deque[float] = deque(maxlen=size)

    def add(self, seconds: float) -> None:
        """Take a step."""
        self._seconds.append(seconds)

    @property
    def p50(self) -> float | None:
        """Median; None before the first step."""
        return median(self._seconds) if self._seconds else None

    @property
    def p99(self) -> float | None:
        """The smallest duration that 99% of the steps do not exceed; None before the first step."""
        if not self._seconds:
            return None
        return sorted(self._seconds)[math.ceil(0.99 * len(self._seconds)) - 1]


class LoadWindow:
    """Counts of tokens per expert, summed over the last steps, without adding them up anew each time.

    Args:
        size: steps that are summed.
        layers, experts: shape of a step's counts.
    """

    def __init__(self, size: int, layers: int, experts: int) -> None:
        self._steps = torch.zeros(size, layers, experts, dtype=torch.int64)
        self.total = torch.zeros(layers, experts, dtype=torch.int64)
        self.is_full = False
        self._next = 0

    def add(self, counts: Tensor) -> None:
        """Take a step in place of the oldest.

        Args:
            counts: int64 [layers, experts], on the CPU.
        """
        oldest = self._steps[self._next]
        self.total += counts - oldest
        oldest.copy_(counts)
        self._next = (self._next + 1) % len(self._steps)
        self.is_full |= self._next == 0
