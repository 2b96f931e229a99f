"""Routings to measure with: which experts every token of every rank uses, with what weights.

    balanced      affinities are independent noise: every expert is as likely as any other
    natural       experts differ in popularity, so that the fullest has twice the mean load
    adversarial   all experts of every token live on rank 0

The first two choose as the model does: best groups first, then experts of those. Ref: DSV3 §2.1.2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_runtime.cli.bench_comm.settings import NATURAL_MAX_OVER_MEAN, Settings
from moe_runtime.errors import ConfigError
from moe_runtime.model.router import choose_experts


@dataclass(frozen=True)
class Routing:
    """Choices of all ranks.

    Args:
        expert_ids: int64 [ranks, tokens, top_k], distinct within a token.
        weights: FP32 [ranks, tokens, top_k], summing to 1 within a token.
    """

    expert_ids: Tensor
    weights: Tensor

    def loads(self, num_experts: int) -> Tensor:
        """Rows of each expert, all ranks together: int64 [num_experts]."""
        return torch.bincount(self.expert_ids.flatten(), minlength=num_experts)


def max_over_mean(loads: Tensor) -> float:
    """The fullest expert's (or rank's) rows over the mean."""
    return float(loads.max() / loads.to(torch.float64).mean())


def make_routing(name: str, settings: Settings) -> Routing:
    """The routing of that name, from the seed alone.

    Args:
        name: one of ROUTINGS.
        settings: shape and seed.

    Raises:
        ConfigError: adversarial, and a rank has fewer experts than a token chooses.
    """
    draw = torch.Generator().manual_seed(settings.seed)
    num_tokens = settings.world_size * settings.tokens
    if name == "adversarial":
        if settings.local_experts < settings.top_k:
            raise ConfigError(
                f"bench comm: adversarial routing needs {settings.top_k} experts on a rank, "
                f"got {settings.local_experts}; use fewer ranks"
            )
        affinities = torch.rand(num_tokens, settings.local_experts, generator=draw)
        expert_ids = affinities.topk(settings.top_k, dim=1).indices
        return _shaped(expert_ids, affinities, settings)
    noise = torch.randn(num_tokens, settings.num_experts, generator=draw)
    if name == "balanced":
        return _routed(noise, settings)
    popularity = torch.randn(settings.num_experts, generator=draw)
    spread = _spread_for(noise, popularity, settings)
    return _routed(noise + spread * popularity, settings)


def _routed(logits: Tensor, settings: Settings) -> Routing:
    affinities = logits.sigmoid()
    no_bias = torch.zeros(settings.num_experts)
    groups, kept = settings.num_groups, settings.groups_kept
    return _shaped(choose_experts(affinities, no_bias, settings.top_k, groups, kept), affinities, settings)


def _shaped(expert_ids: Tensor, affinities: Tensor, settings: Settings) -> Routing:
    weights = affinities.gather(1, expert_ids)
    shape = (settings.world_size, settings.tokens, settings.top_k)
    return Routing(expert_ids.view(shape), (weights / weights.sum(1, keepdim=True)).view(shape))


def _spread_for(noise: Tensor, popularity: Tensor, settings: Settings) -> float:
    """How strongly popularity must count for the fullest expert to have the load wanted (bisection)."""
    low, high = 0.0, 2.0
    for _ in range(10):
        middle = (low + high) / 2
        loads = _routed(noise + middle * popularity, settings).loads(settings.num_experts)
        if max_over_mean(loads) < NATURAL_MAX_OVER_MEAN:
            low = middle
        else:
            high = middle
    return (low + high) / 2
