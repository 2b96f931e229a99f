"""A text as a chain of blocks of 64 tokens, each with a key that depends on all before it.

    key(-1) = SHA-256(model)        key(i) = SHA-256(key(i-1), tokens of block i)

Blocks begin at token 0 only: attention sees positions and everything before, so the same words further on
have other latents. A block carries what its key was made of, which stores keep beside the latents and
compare: whatever brings wrong content under a key, it is then no hit.
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Block:
    """One link of the chain.

    Args:
        key: 32 bytes.
        parent: key of the block before, or of the model.
        tokens: int64 [64] as bytes.
    """

    key: bytes
    parent: bytes
    tokens: bytes


def blocks_of(fingerprint: str, tokens: Sequence[int]) -> list[Block]:
    """The whole blocks of `tokens`, the first one first; what is left over at the end is in none."""
    size = BLOCK_TOKENS * 8
    whole = array("q", tokens[: len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS]).tobytes()
    parent = hashlib.sha256(b"moe_runtime prefix " + fingerprint.encode()).digest()
    blocks = []
    for start in range(0, len(whole), size):
        own = whole[start : start + size]
        block = Block(hashlib.sha256(parent + own).digest(), parent, own)
        blocks.append(block)
        parent = block.key
    return blocks
