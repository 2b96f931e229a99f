"""Choices of a router that prefers no expert, drawn: which experts tokens go to, and which places they reach.

Every affinity is drawn alike, and then chosen as the model chooses: groups by the sum of their two best
affinities, experts from the groups kept. Such a router loads all experts alike, and yet its choice is not a
uniform one: a group is kept because two of its experts are high, so of eight experts from four kept groups
nearly every token has some in each of the four. For V3 a token reaches 3.95 nodes; drawing experts from kept
groups at random, the textbook formula, gives 3.63, and 9% too few bytes between nodes.

No closed form is known for that, so tokens are drawn, always the same ones. Where routing has no groups, the
choice is uniform by symmetry and `exchange` takes the formula.

Ref: DSV3 §2.1.2 (node-limited routing).
"""

import random
from functools import lru_cache
from heapq import nlargest

from moe_runtime.config.schema import ModelConfig

# For V3 these are 6,000 tokens, the standard error of the nodes that a token reaches is 0.06%, of the ranks
# 0.1%, and drawing takes 0.4 s, once.
NUM_AFFINITIES, MOST_TOKENS = 1_536_000, 30_000

Choices = tuple[tuple[int, ...], ...]


def drawn_choices(model: ModelConfig) -> Choices:
    """Experts of some thousands of tokens, ascending."""
    return _draw(model.num_experts, model.num_groups, model.num_groups_kept, model.top_k)


def places_reached(choices: Choices, experts: int) -> float:
    """Distinct places that a token reaches in the mean.

    Args:
        experts: consecutive ones that a place holds.
    """
    return sum(len({expert // experts for expert in chosen}) for chosen in choices) / len(choices)


@lru_cache(maxsize=16)
def _draw(num_experts: int, num_groups: int, kept: int, top_k: int) -> Choices:
    source = random.Random(0)
    size = num_experts // num_groups
    tokens = []
    for _ in range(min(MOST_TOKENS, NUM_AFFINITIES // num_experts)):
        affinities = [source.random() for _ in range(num_experts)]
        groups = [affinities[first : first + size] for first in range(0, num_experts, size)]
        scores = [sum(nlargest(2, group)) for group in groups]
        best = nlargest(kept, range(num_groups), key=scores.__getitem__)
        eligible = [expert for group in best for expert in range(group * size, (group + 1) * size)]
        tokens.append(tuple(sorted(nlargest(top_k, eligible, key=affinities.__getitem__))))
    return tuple(tokens)
