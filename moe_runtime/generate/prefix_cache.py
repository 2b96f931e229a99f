"""Latents of texts that were read before: a prompt that begins like one of them need not compute them again.

A text is cut into blocks of 64 tokens from its first token on (`prefix_blocks`). Blocks lie in memory, on
disk (`prefix_disk`), or in both, memory asked first; each place is bounded and lets the least recently used
go first. A prefix that is found is one that was stored: any doubt about a block ends the prefix before it.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_runtime.generate.prefix_blocks import BLOCK_TOKENS, Block, blocks_of
from moe_runtime.generate.prefix_disk import DiskTier
from moe_runtime.generate.prefix_fingerprint import LatentForm
from moe_runtime.generate.prefix_memory import MemoryTier
from moe_runtime.generate.prefix_tier import Tier

_log = logging.getLogger(__name__)


class PrefixCache:
    """A prefix cache of one model over places to keep blocks, the fastest first; for one thread.

    Args:
        form: of the model's latents.
        tiers: asked in this order; the first also keeps what is found further down.
    """

    def __init__(self, form: LatentForm, tiers: Sequence[Tier]) -> None:
        self._form, self._tiers = form, tuple(tiers)
        self._lookups = self._hit_tokens = self._miss_tokens = 0

    def find(self, tokens: Sequence[int]) -> Tensor | None:
        """The latents of the longest beginning of `tokens` that is known.

        Returns:
            [layers, 64 n, width] for n >= 1 blocks, a new tensor on the CPU; None if not one is known.
        """
        path: list[Block] = []
        found: list[Tensor] = []
        fetched: dict[bytes, Tensor] = {}
        for block in blocks_of(self._form.fingerprint, tokens):
            latents = self._read(block, fetched)
            if latents is None:
                break
            path.append(block)
            found.append(latents)
        self._note(path, fetched)
        hit_tokens = BLOCK_TOKENS * len(path)
        self._lookups += 1
        self._hit_tokens += hit_tokens
        self._miss_tokens += len(tokens) - hit_tokens
        return torch.cat(found, dim=1) if found else None

    def store(self, tokens: Sequence[int], latents: Tensor) -> None:
        """Keep the whole blocks of `tokens` that are new.

        Args:
            tokens: from the first one of the text on.
            latents: [layers, slots, width] with a slot for each token of the whole blocks, and maybe more.

        Raises:
            ValueError: latents of another shape or dtype than the model's.
        """
        path = blocks_of(self._form.fingerprint, tokens)
        self._check(latents, BLOCK_TOKENS * len(path))
        wanted = {block.key for tier in self._tiers for block in tier.lacks(path)}
        ready: dict[bytes, Tensor] = {}
        for block, part in zip(path, latents.detach().split(BLOCK_TOKENS, dim=1), strict=False):
            if block.key in wanted:
                ready[block.key] = torch.empty(part.shape, dtype=part.dtype).copy_(part)
        for tier in self._tiers:
            tier.keep(path, ready)

    def statistics(self) -> dict[str, Any]:
        """Counts since the cache was opened: look-ups, tokens found and not, and blocks of each tier."""
        return {
            "lookups": self._lookups,
            "hit_tokens": self._hit_tokens,
            "miss_tokens": self._miss_tokens,
            **{tier.name: vars(tier.statistics).copy() for tier in self._tiers},
        }

    def _read(self, block: Block, fetched: dict[bytes, Tensor]) -> Tensor | None:
        for level, tier in enumerate(self._tiers):
            latents = tier.read(block)
            if latents is not None:
                if level:
                    fetched[block.key] = latents
                return latents
        return None

    def _note(self, path: Sequence[Block], fetched: dict[bytes, Tensor]) -> None:
        """The path was used; the first tier takes what came from further down."""
        for level, tier in enumerate(self._tiers):
            if level == 0 and fetched:
                tier.keep(path, fetched)
            else:
                tier.note_use(path)

    def _check(self, latents: Tensor, num_slots: int) -> None:
        form = self._form
        layers, slots, width = latents.shape
        if (layers, width, latents.dtype) != (form.num_layers, form.width, form.dtype) or slots < num_slots:
            raise ValueError(
                f"latents: expected {form.dtype} [{form.num_layers}, at least {num_slots}, {form.width}], "
                f"got {latents.dtype} {list(latents.shape)}"
            )


def open_prefix_cache(
    form: LatentForm, memory_bytes: int, cache_dir: Path | None = None, disk_bytes: int = 0
) -> PrefixCache:
    """A cache in memory over one on disk; without the latter, after a warning, if it cannot be opened.

    Args:
        form: of `latent_form_of`.
        memory_bytes: bound of the first; 0: none.
        cache_dir: folder of the second; None: none.
        disk_bytes: bound of the second.
    """
    tiers: list[Tier] = [MemoryTier(form, memory_bytes)]
    if cache_dir is not None:
        try:
            tiers.append(DiskTier(form, cache_dir, disk_bytes))
        except OSError as error:
            _log.warning(
                "prefix cache: %s cannot be used (%s); going on without it", cache_dir, error.strerror
            )
    return PrefixCache(form, tiers)
