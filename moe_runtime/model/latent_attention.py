"""Attention of new tokens to a latent cache, in two forms that give the same numbers. Ref: DSV3 (1)-(11).

    lifted     keys and values grow out of all latents in reach, then heads attend as in training
    absorbed   a query is carried through the key's up-projection instead, q_nope W_UK, and meets the latents
               themselves; what is gathered from them goes through W_UV at the end

The absorbed form reads each latent once for all heads and lifts nothing, so it is the one for few new tokens;
a pair of query and key costs 2 kv_lora + rope products a head instead of nope + rope + v, so many new tokens
are cheaper lifted. `_lifts` reckons which. Neither keeps anything but latents.

Scores and sums are in FP32 at least, as in the kernels of training.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe_runtime.model.mla import MLA
from moe_runtime.model.norm import RMSNorm
from moe_runtime.model.product import product, wide
from moe_runtime.model.rope import rotate


@dataclass(frozen=True)
class Reach:
    """Where the new tokens of a pass stand in a layer's slots, and what they may look at.

    Args:
        slots: int64 [rows, new], slot of each new token.
        valid: bool [rows, new], which of them are there; None: all.
        turns: complex [tokens, rope / 2], rotary turns of the tokens that are there.
        first, stop: slots below `first` or from `stop` on are out of everyone's reach.
        mask: bool [rows, new, stop - first], True where a token may look; None: at all of these slots.
        causal: `mask` would be the plain triangle over the new tokens, with nothing before them.
    """

    slots: Tensor
    valid: Tensor | None
    turns: Tensor
    first: int
    stop: int
    mask: Tensor | None
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


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm without a tape."""
    return module.normalise(x, module.weight, module.eps)[0]


class LatentAttention:
    """MLA of one layer for tokens that come one after the other.

    Args:
        mla: whose weights it uses, as they are at each call.
    """

    def __init__(self, mla: MLA) -> None:
        self._mla = mla
        self._rank, self._rope = mla.config.kv_lora_rank, mla.rope
        self._heads = mla.config.num_heads

    def __call__(self, x: Tensor, latents: Tensor, reach: Reach) -> Tensor:
        """Attend, and leave the new tokens' latents in the cache.

        Args:
            x: normed stream [tokens, hidden] of the new tokens.
            latents: this layer's [rows, slots, kv_lora + rope], written at `reach.slots`.
            reach: where they stand.

        Returns:
            [tokens, hidden].
        """
        mla = self._mla
        latent, k_rope = product(x, mla.kv_a.weight.t()).split([self._rank, self._rope], dim=1)
        query = self._query(x)
        high = torch.promote_types(x.dtype, torch.float32)
        keys_too = torch.cat((query[..., mla.nope :], k_rope.unsqueeze(1)), dim=1).to(high)
        turned = rotate(keys_too, reach.turns).to(x.dtype)  # [tokens, heads + 1, rope]
        self._remember(torch.cat((norm(mla.kv_a_norm, latent), turned[:, -1]), dim=1), latents, reach)
        attend = self._lifted if self._lifts(reach) else self._absorbed
        known = latents[:, reach.first : reach.stop]
        heads = attend(query[..., : mla.nope], turned[:, :-1], known, reach)
        return product(heads.flatten(1).to(x.dtype), mla.o.weight.t())

    def _query(self, x: Tensor) -> Tensor:
        """Queries of all heads before the rotary part is turned: [tokens, heads, nope + rope]."""
        mla = self._mla
        if mla.config.q_lora_rank is None:
            flat = product(x, mla.q.weight.t())
        else:
            flat = product(norm(mla.q_a_norm, product(x, mla.q_a.weight.t())), mla.q_b.weight.t())
        return flat.unflatten(1, (self._heads, -1))

    @staticmethod
    def _remember(new: Tensor, latents: Tensor, reach: Reach) -> None:
        rows = latents.shape[0]
        if rows == 1 and reach.valid is None:
            begin = reach.stop - reach.slots.shape[1]
            latents[0, begin : reach.stop] = new
            return
        place = torch.arange(rows, device=latents.device).unsqueeze(1).expand_as(reach.slots)
        latents.index_put_((reach.pack(place), reach.pack(reach.slots)), new)

    def _lifts(self, reach: Reach) -> bool:
        """Whether growing keys and values out of the latents is the cheaper form."""
        mla, new = self._mla, reach.slots.shape[1]
        lift = self._rank * (mla.nope + mla.v)  # of each latent, for each head
        saved = 2 * self._rank + self._rope - (mla.nope + self._rope + mla.v)  # for each new token
        carried = self._rank * (mla.nope + mla.v) * new  # queries in, outputs back
        known = reach.stop - reach.first
        return new > 1 and lift * known < saved * known * new + carried

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, known: Tensor, reach: Reach) -> Tensor:
        """Queries meet latents: [tokens, heads, v]."""
        mla = self._mla
        rows, new = reach.slots.shape
        up = mla.kv_b.weight.view(self._heads, mla.nope + mla.v, self._rank)
        q_latent = torch.bmm(q_nope.transpose(0, 1), up[:, : mla.nope]).transpose(0, 1)
        query = reach.spread(torch.cat((q_latent, q_rope), dim=2)).view(rows, new * self._heads, -1)
        high = torch.promote_types(query.dtype, torch.float32)
        scores = torch.bmm(query.to(high), known.to(high).transpose(1, 2)).mul_(mla.scale)
        if reach.mask is not None:
            each = scores.view(rows, new, self._heads, -1)
            each.masked_fill_(~reach.mask.unsqueeze(2), float("-inf"))
        weights = scores.softmax(dim=2)
        gathered = torch.bmm(weights, known[..., : self._rank].to(high)).view(rows, new, self._heads, -1)
        gathered = reach.pack(gathered).to(q_nope.dtype).transpose(0, 1)
        return torch.bmm(gathered, up[:, mla.nope :].transpose(1, 2)).transpose(0, 1)

    def _lifted(self, q_nope: Tensor, q_rope: Tensor, known: Tensor, reach: Reach) -> Tensor:
        """Heads of training, grown out of the latents in reach: [tokens, heads, v]."""
        mla = self._mla
        rows, count = known.shape[:2]
        query = wide(reach.spread(torch.cat((q_nope, q_rope), dim=2)).transpose(1, 2))
        latent, k_rope = known.split([self._rank, self._rope], dim=2)
        lifted = product(latent.reshape(rows * count, -1), mla.kv_b.weight.t())
        heads = lifted.view(rows, count, self._heads, -1).transpose(1, 2)
        shared = k_rope.unsqueeze(1).expand(-1, self._heads, -1, -1)
        key = wide(torch.cat((heads[..., : mla.nope], shared), dim=3))
        value = wide(heads[..., mla.nope :])
        width = key.shape[3]
        if not value.is_cuda and width > mla.v:  # the CPU's flash kernel wants equal widths
            value = nn.functional.pad(value, (0, width - mla.v))
        mask = None if reach.mask is None or reach.causal else reach.mask.unsqueeze(1)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=reach.causal, scale=mla.scale
        )
        return reach.pack(out[..., : mla.v].transpose(1, 2))
