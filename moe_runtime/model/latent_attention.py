"""Attention of new tokens to a latent cache, in two forms that give the same numbers. Ref: DSV3 (1)-(11).

    lifted     keys and values grow out of all latents in reach, then heads attend as in training
    absorbed   a query is carried through the key's up-projection instead, q_nope W_UK, and meets the latents
               themselves; what is gathered from them goes through W_UV at the end

The absorbed form reads each latent once for all heads and lifts nothing, so it is the one for few new tokens;
a pair of query and key costs 2 kv_lora + rope products a head instead of nope + rope + v, so many new tokens
are cheaper lifted. `_lifts` reckons which. Neither keeps anything but latents.

Scores and sums are in FP32 at least, as in the kernels of training. On a GPU the absorbed form's middle is
one kernel (`latent_attention_triton.py`), which reads the latents as they lie; elsewhere, and as its oracle,
torch's products in FP32.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

from moe_runtime.model.mla import MLA
from moe_runtime.model.norm import RMSNorm, normalise
from moe_runtime.model.product import product, wide
from moe_runtime.model.reach import Reach
from moe_runtime.model.rope import rotate


def _kernels(latents: Tensor, rank: int) -> ModuleType | None:
    """Queries meet latents in one kernel, where this device has it."""
    if not latents.is_cuda:
        return None
    from moe_runtime.model import latent_attention_triton  # brings triton

    return latent_attention_triton if latent_attention_triton.serves(latents, rank) else None


def gather(q_latent: Tensor, q_rope: Tensor, known: Tensor, scale: float, barrier: Tensor | None) -> Tensor:
    """Softmax-weighted sums of latents, for each head of each query, in at least FP32.

    Args:
        q_latent: queries through the key's up-projection, [rows, new, heads, kv_lora].
        q_rope: their rotary parts, [rows, new, heads, rope].
        known: latents [rows, slots, kv_lora + rope].
        scale: of the scores.
        barrier: [rows, new, 1, slots], added to them; None: nothing.

    Returns:
        [rows, new, heads, kv_lora].
    """
    new, heads, rank = q_latent.shape[1:]
    query = torch.cat((q_latent, q_rope), dim=3).flatten(1, 2)
    high = torch.promote_types(query.dtype, torch.float32)
    keys = known.to(high)
    scores = torch.bmm(query.to(high), keys.transpose(1, 2)).mul_(scale)
    if barrier is not None:
        scores.unflatten(1, (new, heads)).add_(barrier)
    return torch.bmm(scores.softmax(dim=2), keys[..., :rank]).unflatten(1, (new, heads))


class Norm:
    """RMSNorm without a tape."""

    def __init__(self, module: RMSNorm) -> None:
        self._gain, self._eps = module.weight.detach(), module.eps
        high = torch.promote_types(self._gain.dtype, torch.float32)
        self._least = torch.tensor(module.eps, dtype=high, device=self._gain.device)
        self._share = 1.0 / self._gain.shape[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x [..., dim]."""
        if x.dtype == torch.bfloat16:  # FP32 inside, rounded once
            return normalise(x, self._gain, self._eps)[0]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # half the time of torch's own RMSNorm
        rstd = torch.addcmul(self._least, norm, norm, value=self._share).rsqrt_()
        return torch.mul(x, rstd).mul_(self._gain)


class LatentAttention:
    """MLA of one layer for tokens that come one after the other.

    Args:
        mla: whose weights it reads, where they lie.
    """

    def __init__(self, mla: MLA) -> None:
        self._rank, self._rope, self._nope, self._v = mla.config.kv_lora_rank, mla.rope, mla.nope, mla.v
        self._heads, self._scale = mla.config.num_heads, mla.scale
        if mla.config.q_lora_rank is None:
            self._q_a = self._q_a_norm = None
            self._q_b = mla.q.weight.detach().t()
        else:
            self._q_a, self._q_a_norm = mla.q_a.weight.detach().t(), Norm(mla.q_a_norm)
            self._q_b = mla.q_b.weight.detach().t()
        self._kv_a, self._kv_a_norm = mla.kv_a.weight.detach().t(), Norm(mla.kv_a_norm)
        self._kv_b, self._o = mla.kv_b.weight.detach().t(), mla.o.weight.detach().t()
        up = self._kv_b.t().view(self._heads, self._nope + self._v, self._rank)
        self._up_key, self._up_value = up[:, : self._nope], up[:, self._nope :].transpose(1, 2)

    def __call__(self, x: Tensor, latents: Tensor, reach: Reach) -> Tensor:
        """Attend, and leave the new tokens' latents in the cache.

        Args:
            x: normed stream [tokens, hidden] of the new tokens.
            latents: this layer's [rows, slots, kv_lora + rope], written at `reach.slots`.
            reach: where they stand.

        Returns:
            [tokens, hidden].
        """
        latent, k_rope = product(x, self._kv_a).split([self._rank, self._rope], dim=1)
        query = self._query(x)
        q_nope, q_rope = query[..., : self._nope], query[..., self._nope :]
        unturned = torch.cat((q_rope, k_rope.unsqueeze(1)), dim=1)
        turned = rotate(unturned.to(reach.turns.dtype.to_real()), reach.turns).to(x.dtype)
        reach.remember(torch.cat((self._kv_a_norm(latent), turned[:, -1]), dim=1), latents)
        attend = self._lifted if self._lifts(reach) else self._absorbed
        heads = attend(q_nope, turned[:, :-1], latents, reach)
        return product(heads.flatten(1).to(x.dtype), self._o)

    def _query(self, x: Tensor) -> Tensor:
        """Queries of all heads before the rotary part is turned: [tokens, heads, nope + rope]."""
        if self._q_a is not None and self._q_a_norm is not None:
            x = self._q_a_norm(product(x, self._q_a))
        return product(x, self._q_b).view(x.shape[0], self._heads, -1)

    def _lifts(self, reach: Reach) -> bool:
        """Whether growing keys and values out of the latents is the cheaper form."""
        new = reach.slots.shape[1]
        lift = self._rank * (self._nope + self._v)  # of each latent, for each head
        saved = 2 * self._rank - self._nope - self._v  # for each new token and latent
        carried = self._rank * (self._nope + self._v) * new  # queries in, outputs back
        known = reach.stop - reach.first
        return new > 1 and lift * known < saved * known * new + carried

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, reach: Reach) -> Tensor:
        """Queries meet latents: [tokens, heads, v]."""
        q_latent = torch.bmm(q_nope.transpose(0, 1), self._up_key).transpose(0, 1)
        q_latent, q_rope = reach.spread(q_latent), reach.spread(q_rope)
        kernels = _kernels(latents, self._rank)
        if kernels is None:
            known = latents[:, reach.first : reach.stop]
            gathered = gather(q_latent, q_rope, known, self._scale, reach.barrier).to(q_nope.dtype)
        else:
            queries, ends = (q_latent.flatten(0, 1), q_rope.flatten(0, 1)), (reach.first, reach.stop)
            gathered = kernels.attend(*queries, latents, reach.slots, self._scale, *ends, reach.begins)
        gathered = reach.pack(gathered.view(*reach.slots.shape, self._heads, -1)).transpose(0, 1)
        return torch.bmm(gathered, self._up_value).transpose(0, 1)

    def _lifted(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, reach: Reach) -> Tensor:
        """Heads of training, grown out of the latents in reach: [tokens, heads, v]."""
        known = latents[:, reach.first : reach.stop]
        rows, count = known.shape[:2]
        query = wide(reach.spread(torch.cat((q_nope, q_rope), dim=2)).transpose(1, 2))
        latent, k_rope = known.split([self._rank, self._rope], dim=2)
        lifted = product(latent.reshape(rows * count, -1), self._kv_b)
        heads = lifted.view(rows, count, self._heads, -1).transpose(1, 2)
        shared = k_rope.unsqueeze(1).expand(-1, self._heads, -1, -1)
        key = wide(torch.cat((heads[..., : self._nope], shared), dim=3))
        value = wide(heads[..., self._nope :])
        width = key.shape[3]
        if not value.is_cuda and width > self._v:  # the CPU's flash kernel wants equal widths
            value = nn.functional.pad(value, (0, width - self._v))
        mask = None
        if not reach.causal and reach.barrier is not None:
            mask = reach.barrier.transpose(1, 2).to(query.dtype)
        out = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=reach.causal, scale=self._scale
        )
        return reach.pack(out[..., : self._v].transpose(1, 2))
