"""Where the new tokens of a pass stand in a cache, and what they may look at."""

from dataclasses import dataclass
from functools import cached_property

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
        begins: int64 [rows, new], the first slot that each new token may look at; None: `first`.
        limited: some token may not look at all of these slots: at none behind it, at none before `begins`.
        causal: each may look at the new tokens up to itself, and there is nothing before them.
    """

    slots: Tensor
    valid: Tensor | None
    turns: Tensor
    first: int
    stop: int
    begins: Tensor | None = None
    limited: bool = True
    causal: bool = False

    @cached_property
    def barrier(self) -> Tensor | None:
        """0 where a token may look and -inf elsewhere, in at least FP32: [rows, new, 1, stop - first].

        None: everywhere. Made when it is first asked for, since a kernel that knows slots needs none.
        """
        if not self.limited:
            return None
        reached = torch.arange(self.first, max(self.stop, self.first), device=self.slots.device)
        hidden = reached > self.slots.unsqueeze(2)
        if self.begins is not None:
            hidden |= reached < self.begins.unsqueeze(2)
        nothing = torch.zeros(hidden.shape, dtype=self.turns.dtype.to_real(), device=hidden.device)
        return nothing.masked_fill_(hidden, float("-inf")).unsqueeze(2)

    def spread(self, packed: Tensor) -> Tensor:
        """Values [tokens, ...] of the tokens that are there, as [rows, new, ...]; the others zero."""
        shape = (*self.slots.shape, *packed.shape[1:])
        if self.valid is None:
            return packed.view(shape)
        return packed.new_zeros(shape).flatten(0, 1).index_copy_(0, self._there, packed).view(shape)

    def pack(self, spread: Tensor) -> Tensor:
        """The way back: [rows, new, ...] to [tokens, ...]."""
        flat = spread.flatten(0, 1)
        return flat if self.valid is None else flat.index_select(0, self._there)

    @cached_property
    def _there(self) -> Tensor:
        """Numbers of the tokens that are there, found once: on a GPU the host waits for them."""
        assert self.valid is not None, "asked for where some are missing"
        return self.valid.flatten().nonzero().squeeze(1)

    def remember(self, new: Tensor, cached: Tensor) -> None:
        """Write what new tokens leave, [tokens, width], into a layer's [rows, slots, width]."""
        rows = cached.shape[0]
        if rows == 1 and self.valid is None:
            begin = self.stop - self.slots.shape[1]
            cached[0, begin : self.stop] = new
            return
        cached.index_put_(self._places, new)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Row and slot of each token that is there, for all layers."""
        rows = torch.arange(self.slots.shape[0], device=self.slots.device).unsqueeze(1)
        return self.pack(rows.expand_as(self.slots)), self.pack(self.slots)
