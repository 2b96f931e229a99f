"""Multi-head attention of new tokens to cached keys and values. Ref: Vaswani et al. 2017, §3.2.2.

A token leaves in each layer the values and the rotated keys of all heads, in this order:

    [heads x v | heads x (nope + rope)]

Nothing is lifted and there is one form only: new queries meet the keys as they lie. The CPU's flash kernel
wants values as wide as keys. Padding them would copy all cached values at every token; instead a head's
values are read on into what lies behind them, the next head's or the keys, which is always there because
values stand first. The columns that come of it are dropped.
"""

import torch
from torch import Tensor

from moe_runtime.model.mha import MHA, attend, turn_heads
from moe_runtime.model.product import product, wide
from moe_runtime.model.reach import Reach


class KeyValueAttention:
    """MHA of one layer for tokens that come one after the other.

    Args:
        mha: whose weights it reads, where they lie.
    """

    def __init__(self, mha: MHA) -> None:
        self._heads, self._scale = mha.heads, mha.scale
        self._q, self._k = mha.q.weight.detach().t(), mha.k.weight.detach().t()
        self._v, self._o = mha.v.weight.detach().t(), mha.o.weight.detach().t()
        self._v_dim = self._v.shape[1] // self._heads

    def __call__(self, x: Tensor, cached: Tensor, reach: Reach) -> Tensor:
        """Attend, and leave the new tokens' keys and values in the cache.

        Args:
            x: normed stream [tokens, hidden] of the new tokens.
            cached: this layer's [rows, slots, heads x (v + nope + rope)], written at `reach.slots`.
            reach: where they stand.

        Returns:
            [tokens, hidden].
        """
        unturned = torch.stack((product(x, self._q), product(x, self._k)), dim=1)
        unturned = unturned.view(x.shape[0], 2 * self._heads, -1)
        query, key = turn_heads(unturned, reach.turns).split(self._heads, dim=1)
        reach.remember(torch.cat((product(x, self._v), key.flatten(1)), dim=1), cached)
        keys, values = self._parts(wide(cached[:, reach.first : reach.stop]))
        mask = None
        if not reach.causal and reach.barrier is not None:
            mask = reach.barrier.transpose(1, 2).to(keys.dtype)
        heads = attend(wide(reach.spread(query)), keys, values, self._scale, mask, reach.causal)
        return product(reach.pack(heads[..., : self._v_dim]).flatten(1).to(x.dtype), self._o)

    def _parts(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [rows, slots, heads, width], as views."""
        behind = self._heads * self._v_dim
        keys = known[..., behind:].unflatten(2, (self._heads, -1))
        wanted = self._v_dim if known.is_cuda else max(self._v_dim, keys.shape[3])
        strides = (*known.stride()[:2], self._v_dim, 1)
        return keys, known.as_strided((*keys.shape[:3], wanted), strides)
