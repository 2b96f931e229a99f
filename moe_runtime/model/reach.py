"""Where the new tokens of a pass stand in a cache, and what they may look at."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Reach:
    """Where the new tokens of a pass stand in a layer's slots, and what they may look at.

    Args:
        slots: int64 [rows, new], slot of each new token.
        valid: bool [rows, new], which of them are there; None: all.
        turns: complex [tokens, rope / 2], rotary turns of the tokens that are there.
        first, stop: slots below `first` or from `stop` on are out of everyone's reach.
        barrier: [rows, new, 1, stop - first], 0 where a token may look and -inf elsewhere, in at least FP32;
            None: it may look at all of these slots.
        causal: `barrier` is the plain triangle over the new tokens, with nothing before them.
    """

    slots: Tensor
    valid: Tensor | None
    turns: Tensor
    first: int
    stop: int
    barrier: Tensor | None
    causal: bool = False

    def spread(self, packed: Tensor) -> Tensor:
        """Values [tokens, ...] of the tokens that are there, as [rows, new, ...]; the others zero."""
        shape = (*self.slots.shape, *packed.shape[1:])
        if self.valid is None:
            return packed.view(shape)
        spread = packed.new_zeros(shape)
        spread[self.valid] = packed
        return spread

    def pack(self, spread: Tensor) -> Tensor:
        """The way back: [rows, new, ...] to [tokens, ...]."""
        return spread.flatten(0, 1) if self.valid is None else spread[self.valid]

    def remember(self, new: Tensor, cached: Tensor) -> None:
        """Write what new tokens leave, [tokens, width], into a layer's [rows, slots, width]."""
        rows = cached.shape[0]
        if rows == 1 and self.valid is None:
            begin = self.stop - self.slots.shape[1]
            cached[0, begin : self.stop] = new
            return
        place = torch.arange(rows, device=cached.device).unsqueeze(1).expand_as(self.slots)
        cached.index_put_((self.pack(place), self.pack(self.slots)), new)
