"""A MoE FFN for a handful of tokens: each chosen expert is called once, nothing is sorted or gathered.

When a token or two are decoded, preparing rows for a grouped product costs more than the products. Here the
experts that were chosen are known on the host, and each reads its tokens and adds to its outputs. The journey
through a dispatcher (`inference.py`) is the oracle, and the way for many tokens, for GPUs, and for experts on
other ranks.
"""

import torch
from torch import Tensor

from moe_runtime.model.experts import Experts
from moe_runtime.model.ffn import gated
from moe_runtime.model.product import product

MOST_ROWS = 64  # (token, expert) pairs up to which the loop is the faster way on a CPU


def serves(tokens: Tensor, expert_ids: Tensor) -> bool:
    """Whether there are few enough rows, on a CPU."""
    return expert_ids.numel() <= MOST_ROWS and not tokens.is_cuda


def few_rows(experts: Experts, tokens: Tensor, weights: Tensor, expert_ids: Tensor) -> Tensor:
    """Routed output of all-local experts.

    Args:
        tokens: [tokens, hidden].
        weights: [tokens, top_k] gate weights.
        expert_ids: int64 [tokens, top_k].

    Returns:
        [tokens, hidden].
    """
    gate_up, down = experts.gate_up, experts.down
    out = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, torch.float32))
    for expert, (users, places) in _users(expert_ids).items():
        alone = len(users) == tokens.shape[0]
        rows = tokens if alone else tokens[users]
        middle = gated(product(rows, gate_up[expert].t()))
        middle = (middle * weights.view(-1, 1)[places]).to(tokens.dtype)
        found = product(middle, down[expert].t())
        if alone:
            out += found
        else:
            out[users] += found
    return out.to(tokens.dtype)


def _users(expert_ids: Tensor) -> dict[int, tuple[list[int], list[int]]]:
    """Of each chosen expert: the tokens that use it, ascending, and their places in the flat choice."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    chosen: list[list[int]] = expert_ids.tolist()
    top_k = expert_ids.shape[1]
    for token, choices in enumerate(chosen):
        for place, expert in enumerate(choices, token * top_k):
            users, places = found.setdefault(expert, ([], []))
            users.append(token)
            places.append(place)
    return found
