"""Texts whose true latents are known: a function of all tokens up to a block's end, and of nothing else."""

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from moe_runtime.generate.prefix_blocks import BLOCK_TOKENS
from moe_runtime.generate.prefix_cache import PrefixCache
from moe_runtime.generate.prefix_disk import DiskTier
from moe_runtime.generate.prefix_file import BlockFile
from moe_runtime.generate.prefix_fingerprint import LatentForm
from moe_runtime.generate.prefix_folder import FOLDER
from moe_runtime.generate.prefix_memory import MemoryTier
from moe_runtime.generate.prefix_tier import Tier

FORM = LatentForm("ab" * 32, num_layers=3, width=5, dtype=torch.bfloat16)
BLOCK_BYTES = {"memory": 3 * 64 * 5 * 2 + 64 * 8, "disk": BlockFile(FORM).num_bytes}


def text_of(*words: int, tail: int = 0) -> list[int]:
    """A block of 64 tokens for each word, and `tail` tokens more."""
    return [word * 1000 + i for word in words for i in range(BLOCK_TOKENS)] + [7] * tail


def latents_of(tokens: Sequence[int], form: LatentForm = FORM) -> Tensor:
    """Latents [layers, tokens of whole blocks + 9 slots not in use, width] of a text; not to be changed."""
    return _latents_of(tuple(tokens), form)


@cache
def _latents_of(tokens: tuple[int, ...], form: LatentForm) -> Tensor:
    parts = []
    for end in range(BLOCK_TOKENS, len(tokens) + 1, BLOCK_TOKENS):
        seed = hashlib.blake2b(repr((form.fingerprint, tokens[:end])).encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        shape = (form.num_layers, BLOCK_TOKENS, form.width)
        parts.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(form.dtype))
    unused = torch.full((form.num_layers, 9, form.width), float("nan"), dtype=form.dtype)
    return torch.cat([*parts, unused], dim=1)


def tier_of(kind: str, folder: Path, num_blocks: int, form: LatentForm = FORM) -> Tier:
    """A tier of that kind with room for so many blocks."""
    max_bytes = num_blocks * BLOCK_BYTES[kind]
    return MemoryTier(form, max_bytes) if kind == "memory" else DiskTier(form, folder, max_bytes)


def cache_of(kind: str, folder: Path, num_blocks: int = 1000, form: LatentForm = FORM) -> PrefixCache:
    """A cache of one tier."""
    return PrefixCache(form, [tier_of(kind, folder, num_blocks, form)])


def learn(cache: PrefixCache, *texts: Sequence[int]) -> None:
    """Store the true latents of texts."""
    for text in texts:
        cache.store(text, latents_of(text))


def true_blocks(cache: PrefixCache, text: Sequence[int], form: LatentForm = FORM) -> int:
    """How many blocks the cache has of a text; fails unless they are the true ones."""
    found = cache.find(text)
    if found is None:
        return 0
    slots = found.shape[1]
    assert slots % BLOCK_TOKENS == 0 and 0 < slots <= len(text)
    assert torch.equal(found, latents_of(text, form)[:, :slots])
    return slots // BLOCK_TOKENS


def block_files(folder: Path) -> list[Path]:
    """The files of blocks under a cache folder, in the order of their names."""
    return sorted((folder / FOLDER).glob("*.safetensors"))
