"""Plain multi-head attention, what MLA is compared with. Ref: Vaswani et al. 2017; DSV2 §2.1.1.

Heads are as wide as in MLA: queries and keys have a part without positions and a rotary part, values their
own width. But all three come straight from the stream, and each head has a rotary key of its own:

    q, k, v -> heads (rotate) -> attention -> o

So it differs from MLA in what the latents do, and in nothing else: no narrow middle, no shared rotary key,
no latent norms. The cache pays for it: heads x (nope + rope + v) numbers a token instead of latent + rope.

On the CPU v is padded with zeros to the width of q and k, as in `mla.py`, for its flash kernel's sake.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.linear import Linear
from moe_runtime.model.product import wide
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.rope import Rotary, rotate


def turn_heads(x: Tensor, turns: Tensor) -> Tensor:
    """x [..., seq, heads, nope + rope] with its rotary part turned by complex turns [seq, rope / 2]."""
    nope = x.shape[-1] - 2 * turns.shape[1]
    high = torch.promote_types(x.dtype, torch.float32)
    turned = torch.empty_like(x)
    turned[..., :nope] = x[..., :nope]
    turned[..., nope:] = rotate(x[..., nope:].to(high), turns)
    return turned


class _Turn(torch.autograd.Function):
    """`turn_heads` with its backward; keeps nothing but the table of turns."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, turns: Tensor) -> Tensor:
        ctx.save_for_backward(turns)
        return turn_heads(x, turns)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_turned: Tensor) -> tuple[Tensor, None]:
        return turn_heads(d_turned.contiguous(), ctx.saved_tensors[0].conj()), None


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None, causal: bool
) -> Tensor:
    """Attention of all heads.

    Args:
        query: [batch, new, heads, width]; key: [batch, seq, heads, width]; value: [batch, seq, heads, v].
        mask: as torch's kernel takes it, [batch, 1, new, seq] or None.
        causal: the plain triangle; then there is no mask.

    Returns:
        [batch, new, heads, v].
    """
    width, v_dim = key.shape[-1], value.shape[-1]
    if not value.is_cuda and width > v_dim:
        value = nn.functional.pad(value, (0, width - v_dim))
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale
    )
    return out[..., :v_dim].transpose(1, 2)


class MHA(nn.Module):
    """Multi-head attention of one layer. Ref: Vaswani et al. 2017, §3.2.2.

    Args:
        config: widths.
        rotary: tables shared by all layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.rotary, self.heads = rotary, config.num_heads
        width, v_dim = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden = config.hidden_size
        self.q = Linear(hidden, self.heads * width, **kind)
        self.k = Linear(hidden, self.heads * width, **kind)
        self.v = Linear(hidden, self.heads * v_dim, **kind)
        self.o = Linear(self.heads * v_dim, hidden, **kind)
        self.scale = width**-0.5 * rotary.softmax_factor

    def forward(self, x: Tensor, mask: Tensor | None = None, source: Recomputed[Any] | None = None) -> Tensor:
        """Attend within each sequence, causally.

        Args:
            x: normed stream [batch, seq, hidden].
            mask: bool [batch, 1, seq, seq], True where a position (third axis) may look; None: causal.
            source: makes x again in backward; asked three times.

        Returns:
            [batch, seq, hidden].
        """
        turns = self.rotary.table(x.shape[1], torch.promote_types(x.dtype, torch.float32), x.device)
        query: Tensor = _Turn.apply(self._split(self.q(x, source)), turns)
        key: Tensor = _Turn.apply(self._split(self.k(x, source)), turns)
        out = attend(query, key, self._split(self.v(x, source)), self.scale, mask, causal=mask is None)
        return self.o(out.flatten(2).to(x.dtype))

    def num_source_users(self) -> int:
        """How often one backward asks `source` of `forward`."""
        return 3

    def _split(self, flat: Tensor) -> Tensor:
        return wide(flat).unflatten(-1, (self.heads, -1))
