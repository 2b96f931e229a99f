"""What every place that keeps blocks can do; `prefix_cache` walks the chain and asks them in turn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moe_runtime.generate.prefix_blocks import Block


@dataclass
class TierStatistics:
    """Counts of blocks since the tier was opened, by this process alone.

    Args:
        hits: read and right.
        stored: kept that were not there before.
        evicted: removed to stay within the bound.
        damaged: found broken or under a wrong name, and removed.
    """

    hits: int = 0
    stored: int = 0
    evicted: int = 0
    damaged: int = 0


class Tier(Protocol):
    """Keeps blocks within a bound of bytes.

    A path is the chain of a text from its first block on. The bound cuts it from its end: a block whose
    ancestors are gone can never be found, so ancestors are the last to go.
    """

    name: str
    statistics: TierStatistics

    def read(self, block: Block) -> Tensor | None:
        """Its latents [layers, 64, width], not to be written to; None if they are not here."""
        ...

    def lacks(self, path: Sequence[Block]) -> list[Block]:
        """Those blocks of a path that `keep` would like to have."""
        ...

    def keep(self, path: Sequence[Block], latents: Mapping[bytes, Tensor]) -> None:
        """Take what is lacking and among `latents` (by key; never changed again), and note the path's use."""
        ...

    def note_use(self, path: Sequence[Block]) -> None:
        """The blocks of a path that are here are now the most recently used, the first one before all."""
        ...
