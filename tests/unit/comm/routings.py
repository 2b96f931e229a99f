"""Inputs of every rank of a group, even and ragged, made from a seed alone."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

PATTERNS = (
    "random",
    "unequal",
    "few",
    "zero_tokens",
    "one_expert",
    "idle_expert",
    "idle_rank",
    "adversarial",
    "masked",
    "top_1",
)


@dataclass(frozen=True)
class Inputs:
    """tokens [tokens, hidden], weights [tokens, top_k], expert_ids [tokens, top_k]; lists by rank."""

    tokens: list[Tensor]
    weights: list[Tensor]
    expert_ids: list[Tensor]
    num_experts: int

    def of(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """What one rank dispatches."""
        return self.tokens[rank], self.weights[rank], self.expert_ids[rank]

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """The batch of the whole group, ranks one after another."""
        return torch.cat(self.tokens), torch.cat(self.weights), torch.cat(self.expert_ids)


def draw(
    pattern: str,
    world_size: int,
    *,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    hidden: int = 5,
    seed: int = 0,
) -> Inputs:
    """Inputs of one pattern; the same on every rank that draws them.

    unequal: other numbers of tokens on each rank, the last has none. few: 0, 1 or 2 tokens. zero_tokens:
    nobody has any. one_expert: all tokens choose the last expert (top 1). idle_expert: nobody chooses
    expert 0. idle_rank: nobody chooses an expert of rank 0. adversarial: all choices of all tokens are
    experts of the last rank. masked: a third of the slots is without a choice, and all of every fourth
    token. top_1: one choice a token.
    """
    generator = torch.Generator().manual_seed(seed)
    local_experts = 3
    num_experts = local_experts * world_size
    top_k = 1 if pattern in ("one_expert", "top_1") else 3
    avoided = {
        "idle_expert": 1,
        "idle_rank": local_experts if world_size > 1 else 0,
        "adversarial": num_experts - local_experts,
    }
    tokens, weights, expert_ids = [], [], []
    for rank in range(world_size):
        count = {"zero_tokens": 0, "unequal": 4 * (world_size - 1 - rank), "few": rank % 3}.get(pattern, 7)
        scores = torch.rand(count, num_experts, generator=generator)
        scores[:, : avoided.get(pattern, 0)] = -1.0
        if pattern == "one_expert":
            scores[:, -1] = 2.0
        ids = scores.topk(top_k, dim=1).indices
        tokens.append(torch.randn(count, hidden, generator=generator, dtype=torch.float64).to(dtype))
        drawn = torch.rand(count, top_k, generator=generator, dtype=torch.float64)
        weights.append(drawn.to(weight_dtype))
        if pattern == "masked":
            ids = without_some(ids, 1 / 3, generator)
        expert_ids.append(ids)
    return Inputs(tokens, weights, expert_ids, num_experts)


def without_some(expert_ids: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """The ids with -1 in that share of the slots, and in all of every fourth token."""
    gone = torch.rand(expert_ids.shape, generator=generator) < share
    gone[3::4] = share > 0
    return expert_ids.masked_fill(gone, -1)


def fullest_office(rows_sent: list[list[int]], lanes: int) -> int:
    """Most rows that a rank sends, receives or passes on; counted pair by pair.

    Args:
        rows_sent: of source s for destination d.
        lanes: ranks per node where rows are passed on within nodes; 1 where they go straight.
    """
    offices: Counter[tuple[str, int]] = Counter()
    for source, line in enumerate(rows_sent):
        for destination, rows in enumerate(line):
            offices["sends", source] += rows
            offices["receives", destination] += rows
            offices["passes on", destination // lanes * lanes + source % lanes] += rows
    return max(offices.values())
