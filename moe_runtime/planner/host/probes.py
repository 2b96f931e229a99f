"""What short measurements say of a machine, beside any run."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Probes:
    """One process on each core, all at once.

    Args:
        products: operations a second of `dense`, `groups` and `weight` products, over the terms of a sum.
        attention: operations of the causal triangle a second, `forward` and `backward`, over sequence
            lengths.
        copy_bytes_s: bytes a second of rows put into another order, read and written together.
        message_s: seconds of a message between two processes, over its bytes.
        cores: of the machine.
    """

    products: Mapping[str, Mapping[int, float]]
    attention: Mapping[str, Mapping[int, float]]
    copy_bytes_s: float
    message_s: Mapping[int, float]
    cores: int

    def message(self) -> tuple[float, float]:
        """(fixed seconds, seconds a byte) of a message, from the smallest and the largest."""
        small, large = min(self.message_s), max(self.message_s)
        slope = (self.message_s[large] - self.message_s[small]) / (large - small)
        return self.message_s[small], max(slope, 0.0)
