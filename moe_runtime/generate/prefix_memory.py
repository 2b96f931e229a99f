"""Blocks in this process's memory, the least recently used first out."""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor

from moe_runtime.generate.prefix_blocks import BLOCK_TOKENS, Block
from moe_runtime.generate.prefix_fingerprint import LatentForm
from moe_runtime.generate.prefix_tier import TierStatistics


class MemoryTier:
    """Holds as many blocks of one model as fit; for one thread.

    Args:
        form: of the latents.
        max_bytes: bound of latents and their tokens together.
    """

    def __init__(self, form: LatentForm, max_bytes: int) -> None:
        self.name = "memory"
        self.statistics = TierStatistics()
        latent_bytes = math.prod((form.num_layers, BLOCK_TOKENS, form.width)) * form.dtype.itemsize
        self._block_bytes = latent_bytes + 8 * BLOCK_TOKENS
        self._max_blocks = max_bytes // self._block_bytes
        self._held: OrderedDict[bytes, tuple[Block, Tensor]] = OrderedDict()  # the oldest first

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return len(self._held) * self._block_bytes

    def read(self, block: Block) -> Tensor | None:
        """As `Tier.read`."""
        held, latents = self._held.get(block.key, (None, None))
        if held != block:
            return None
        self.statistics.hits += 1
        return latents

    def lacks(self, path: Sequence[Block]) -> list[Block]:
        """As `Tier.lacks`."""
        return [block for block in path[: self._max_blocks] if block.key not in self._held]

    def keep(self, path: Sequence[Block], latents: Mapping[bytes, Tensor]) -> None:
        """As `Tier.keep`."""
        new = [block for block in self.lacks(path) if block.key in latents]
        self.note_use(path)
        while len(self._held) + len(new) > self._max_blocks:
            self._held.popitem(last=False)
            self.statistics.evicted += 1
        for block in new:
            self._held[block.key] = (block, latents[block.key])
        self.statistics.stored += len(new)
        self.note_use(path)

    def note_use(self, path: Sequence[Block]) -> None:
        """As `Tier.note_use`."""
        for block in reversed(path):
            if block.key in self._held:
                self._held.move_to_end(block.key)
