"""The routed experts of a few tokens, all of them here: sorted by expert, two grouped products, added up.

Training sends tokens through a dispatcher, whose plan has to serve any number of ranks and a backward. Where
a token or two are decoded, that plan costs more than the products; here it is one sort. The journey through
a dispatcher is the oracle, and the way for experts on other ranks.
"""

import torch
from torch import Tensor, nn

from moe_runtime.model.experts import Experts
from moe_runtime.model.ffn import gated

_ALIGNMENT_BYTES = 16  # of each row of a grouped product's operands


def serves(experts: Experts) -> bool:
    """Whether torch has a grouped product for weights of this device, dtype and widths."""
    down = experts.down  # [experts, hidden, middle]
    kinds = (torch.bfloat16,) if down.is_cuda else (torch.float32, torch.bfloat16)
    aligned = all(width * down.element_size() % _ALIGNMENT_BYTES == 0 for width in down.shape[1:])
    return aligned and down.dtype in kinds and hasattr(nn.functional, "grouped_mm")


class LocalExperts:
    """Routed experts of one layer.

    Args:
        experts: all of them; their weights are read where they lie.
    """

    def __init__(self, experts: Experts) -> None:
        self._gate_up = experts.gate_up.detach().transpose(1, 2)
        self._down = experts.down.detach().transpose(1, 2)
        self._numbers = torch.arange(self._down.shape[0], device=self._down.device)

    def __call__(self, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
        """Routed output.

        Args:
            tokens: [tokens, hidden].
            weights: [tokens, top_k] gate weights.
            expert_ids: int64 [tokens, top_k].

        Returns:
            [tokens, hidden].
        """
        chosen, slots = expert_ids.flatten().sort(stable=True)
        users = slots.div(expert_ids.shape[1], rounding_mode="floor")
        ends = torch.searchsorted(chosen, self._numbers, right=True, out_int32=True)
        grouped = nn.functional.grouped_mm
        lifted = grouped(tokens.index_select(0, users), self._gate_up, offs=ends)
        middle = gated(lifted) * weights.flatten().index_select(0, slots).unsqueeze(1)
        rows = grouped(middle.to(tokens.dtype), self._down, offs=ends).to(weights.dtype)
        out = torch.zeros(tokens.shape, dtype=rows.dtype, device=tokens.device)
        return out.index_add_(0, users, rows).to(tokens.dtype)
