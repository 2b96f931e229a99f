"""The router: which experts each token uses, with what weights. Ref: DSV3 (12)-(20).

Selection and weighting are two questions. *Selection* sees sigmoid affinities plus a bias that no
gradient moves (16): groups are scored by the sum of their two best biased affinities, tokens stay in
the best groups (the others are set to -inf, for a biased affinity may well be negative), and the best
top_k of what is left are chosen. *Weights* come from the unbiased affinities of the chosen, renormalised
to sum to one and scaled.

Renormalising s_i / sum s_j is done as a softmax over log s: the same number, but when all chosen
sigmoids underflow it is still the true ratio, never 0/0; an epsilon in the denominator would either
distort it or not be enough. The balance loss normalises over all experts in the same way.
"""

import torch
from torch import Tensor, nn

from moe_runtime.model.linear import linear
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.router_meter import RouterMeter


def choose_experts(
    affinities: Tensor, bias: Tensor, top_k: int, num_groups: int, num_groups_kept: int
) -> Tensor:
    """Bias-corrected, group-limited top-k. Ref: DSV3 (16), §2.1.2; no gradient flows through it.

    Args:
        affinities: sigmoid affinities [tokens, experts].
        bias: [experts].

    Returns:
        int64 [tokens, top_k], distinct within a token.
    """
    biased = biased_affinities(affinities, bias, num_groups, num_groups_kept)
    return biased.topk(top_k, dim=-1, sorted=False).indices


def biased_affinities(affinities: Tensor, bias: Tensor, num_groups: int, num_groups_kept: int) -> Tensor:
    """What experts are chosen by: [tokens, experts], -inf for those of groups that a token leaves out."""
    biased = affinities + bias
    if num_groups_kept >= num_groups:
        return biased
    groups = biased.unflatten(-1, (num_groups, -1))  # [tokens, groups, experts / groups]
    best = groups.topk(min(2, groups.shape[-1]), dim=-1, sorted=False).values.sum(dim=-1)
    kept = best.topk(num_groups_kept, dim=-1, sorted=False).indices
    dropped = torch.ones_like(best, dtype=torch.bool).scatter_(-1, kept, False)
    return groups.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)


def sequence_balance(log_affinities: Tensor, num_sequences: int, top_k: int) -> Tensor:
    """Sequence-wise balance loss, mean over sequences, before its factor alpha. Ref: DSV3 (17)-(20).

    Args:
        log_affinities: log of the sigmoid affinities [tokens, experts], unbiased.
        num_sequences: the tokens are this many sequences of equal length.

    Returns:
        Scalar: mean over sequences of sum_i f_i P_i; 1 when load and affinities are even.
    """
    experts = log_affinities.shape[-1]
    shares = log_affinities.softmax(dim=-1).unflatten(0, (num_sequences, -1)).mean(dim=1)  # P_i
    chosen = log_affinities.detach().topk(top_k, dim=-1, sorted=False).indices
    picks = chosen.view(num_sequences, -1)  # [sequences, tokens of a sequence x top_k]
    ones = log_affinities.new_ones(()).expand(picks.shape)
    counts = log_affinities.new_zeros(num_sequences, experts).scatter_add_(1, picks, ones)
    load = counts * (experts / picks.shape[1])  # f_i: E / (K T) times the count
    return (load * shares).sum(dim=-1).mean()


def update_bias(bias: Tensor, counts: Tensor, gamma: float) -> None:
    """Move the routing bias one step towards balance, in place. Ref: DSV3 §2.1.2 (16).

    +gamma for an expert below the mean load, -gamma above, 0 on a tie; not centred.

    Args:
        bias: FP32 [experts].
        counts: int64 [experts], tokens of the whole global batch; compared exactly.
        gamma: step.
    """
    gap = counts.sum() - counts.numel() * counts
    bias.add_(torch.sign(gap).to(bias.dtype), alpha=gamma)


class Router(nn.Module):
    """Gate of one MoE layer. Ref: DSV3 (12)-(20).

    `weight` [experts, hidden] learns by gradient; `bias` (FP32 buffer [experts]) by `update_bias` alone.

    Args:
        scaling_factor: multiplies the renormalised gate weights.

    Attributes:
        meter: told of the choices of every forward pass that trains; None: nobody is.
    """

    bias: Tensor
    meter: RouterMeter | None = None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        num_groups: int = 1,
        num_groups_kept: int = 1,
        scaling_factor: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.top_k, self.num_groups, self.num_groups_kept = top_k, num_groups, num_groups_kept
        self.scaling_factor = scaling_factor
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32, device=device))

    def forward(self, x: Tensor, source: Recomputed[Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route the tokens of x [sequences, seq, hidden].

        Args:
            source: makes x again in backward; asked once.

        Returns:
            gate weights [tokens, top_k] and the balance loss, a scalar, both in at least FP32, and
            between them expert ids int64 [tokens, top_k].
        """
        high = torch.promote_types(x.dtype, torch.float32)
        logits = linear(x, self.weight, source, out_dtype=high).flatten(0, 1)
        weights, expert_ids, log_affinities = self.choose(logits)
        balance = sequence_balance(log_affinities, x.shape[0], self.top_k)
        return weights, expert_ids, balance

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gate weights and expert ids [tokens, top_k], and log affinities, of logits [tokens, experts]."""
        log_affinities = nn.functional.logsigmoid(logits)
        affinities = logits.detach().sigmoid()
        biased = biased_affinities(affinities, self.bias, self.num_groups, self.num_groups_kept)
        expert_ids = biased.topk(self.top_k, dim=-1, sorted=False).indices
        if self.meter is not None and torch.is_grad_enabled():
            self.meter.add(logits, biased, expert_ids)
        weights = log_affinities.gather(1, expert_ids).softmax(dim=-1) * self.scaling_factor
        return weights, expert_ids, log_affinities
