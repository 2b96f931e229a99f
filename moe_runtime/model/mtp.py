"""Multi-token prediction: depth k predicts one token further. Ref: DSV3 (21)-(25).

In the form of the released weights: the projection reads [norm(embedding); norm(h)], in this order (the
report's (21) writes them the other way round), h of depth 0 is the stream after the final norm, and each
depth's output passes its own norm before the shared head and the next depth. The block is MoE. Embedding
and head are the model's own parameters, looked up when a phase runs.
"""

from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.model.block import Block
from moe_runtime.model.linear import Linear
from moe_runtime.model.norm import RMSNorm
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.rope import Rotary


class MTP(nn.Module):
    """One prediction depth.

    Args:
        config: widths and counts.
        depth: k, from 0: position i joins the embedding of token i+1+k and predicts token i+2+k.
    """

    def __init__(
        self,
        config: ModelConfig,
        depth: int,
        rotary: Rotary,
        recompute: RecomputeConfig,
        num_local_experts: int,
        first_expert: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.depth, self.name, self.recompute = depth, f"mtp.{depth}", recompute
        self.enorm = RMSNorm(hidden, eps, **kind)
        self.hnorm = RMSNorm(hidden, eps, **kind)
        self.eh_proj = Linear(2 * hidden, hidden, **kind)
        self.block = Block(
            config, f"{self.name}.block", rotary, recompute, num_local_experts, first_expert, **kind
        )
        self.norm = RMSNorm(hidden, eps, **kind)

    def join(self, hidden: Tensor, embedded: Tensor) -> Tensor:
        """Input of the block. Ref: DSV3 (21).

        Args:
            hidden: normed stream of the depth before [sequences, seq, hidden].
            embedded: embeddings of tokens i+1+k, same shape.
        """
        source: Recomputed[Tensor] | None = None
        if self.recompute.norm:
            left, right = self.enorm.recomputed(embedded, 1), self.hnorm.recomputed(hidden, 1)
            source = Recomputed(lambda: torch.cat((left.take(), right.take()), dim=-1))
        return self.eh_proj(torch.cat((self.enorm(embedded), self.hnorm(hidden)), dim=-1), source)
