"""What attention remembers of tokens already read: their latents, nothing else. Ref: DSV3 §2.1.1 (1)-(5).

A token leaves kv_lora_rank + qk_rope_head_dim numbers in each layer, the normed latent c_kv and the rotated
shared key; keys and values of all heads grow out of them. All layers lie in one tensor, so that a stretch of
a prompt is one slice of it:

    latents [layers + mtp_depth, rows, slots, kv_lora_rank + qk_rope_head_dim]

Plain multi-head attention (`model.attention: mha`) has no latents: there a token leaves the values and the
rotated keys of all heads in the same place, and all that follows holds for them too.

In a main layer, slot j holds position j. MTP module d joins position i to token i+1+d, so what it leaves of
position i is known once that token is. It lies in slot i+1+d, under the last token it depends on. Hence slots
below n depend on the first n tokens alone, in every layer: dropping tokens is making `lengths` smaller, and a
block of slots can be kept and found again by the tokens up to its end. The first 1+d slots of module d stay
empty, and nobody looks at them.

Rows of a batch have lengths of their own; what lies beyond a row's length is rubbish.
"""

import torch
from torch import Tensor

from moe_runtime.config.counts import cache_width
from moe_runtime.config.schema import ModelConfig

_GROWS_BY = 1.5


class LatentCache:
    """Latents and tokens of a batch of sequences.

    Attributes:
        latents: [layers + mtp_depth, rows, slots, width].
        tokens: int64 [rows, slots], on the same device.
        lengths: int64 [rows], on the CPU: slots of each row that count.
    """

    def __init__(
        self, config: ModelConfig, rows: int, slots: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        layers = config.num_layers + config.mtp_depth
        self.latents = torch.zeros(layers, rows, slots, cache_width(config), dtype=dtype, device=device)
        self.tokens = torch.zeros(rows, slots, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int64)

    @property
    def rows(self) -> int:
        """Sequences held."""
        return self.tokens.shape[0]

    @property
    def slots(self) -> int:
        """Tokens that a row has room for."""
        return self.tokens.shape[1]

    @property
    def bytes_per_token(self) -> int:
        """What one token takes, over all layers."""
        return self.latents.shape[0] * self.latents.shape[3] * self.latents.element_size()

    def reserve(self, slots: int) -> None:
        """Make room for `slots` tokens a row, and some more; the tensors may be others afterwards."""
        if slots <= self.slots:
            return
        more = max(slots, int(self.slots * _GROWS_BY)) - self.slots
        self.latents = torch.nn.functional.pad(self.latents, (0, 0, 0, more))
        self.tokens = torch.nn.functional.pad(self.tokens, (0, more))

    def keep(self, rows: Tensor) -> None:
        """Keep some rows, int64 [rows kept] on the CPU, in this order."""
        there = rows.to(self.tokens.device)
        self.latents = self.latents.index_select(1, there)
        self.tokens = self.tokens.index_select(0, there)
        self.lengths = self.lengths.index_select(0, rows)

    def fill(self, row: int, latents: Tensor, tokens: Tensor) -> None:
        """Begin a row with latents [layers, count, width] that are known already, of tokens [count]."""
        count = tokens.shape[0]
        self.reserve(count)
        self.latents[:, row, :count] = latents.to(self.latents.device)
        self.tokens[row, :count] = tokens.to(self.tokens.device)
        self.lengths[row] = count
