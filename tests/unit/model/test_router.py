"""The router against sorting and loops, at each place where public codes disagree."""

import math

import pytest
import torch
from torch import Tensor

from moe_runtime.model.router import Router, choose_experts, sequence_balance
from tests.unit.model.oracle import balance_loss, choose
from tests.unit.model.samples import F64, draw, small_config


def slow_choice(affinities: Tensor, bias: Tensor, top_k: int, groups: int, kept: int) -> list[set[int]]:
    config = small_config(num_experts=len(bias), top_k=top_k, num_groups=groups, num_groups_kept=kept)
    return [set(choose(row, bias.tolist(), config)) for row in affinities.tolist()]


def as_sets(expert_ids: Tensor) -> list[set[int]]:
    assert all(len(set(row)) == len(row) for row in expert_ids.tolist()), "an expert chosen twice"
    return [set(row) for row in expert_ids.tolist()]


def router_from(logits: Tensor, dtype: torch.dtype = F64, **settings: object) -> tuple[Router, Tensor]:
    """A router whose logits are those given [tokens, experts], and its input [1, tokens, experts]."""
    experts = logits.shape[1]
    router = Router(experts, experts, dtype=dtype, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router, logits.to(dtype).unsqueeze(0)


@pytest.mark.parametrize("shift", [0.0, -3.0, 3.0])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "kept"),
    [(8, 3, 1, 1), (8, 3, 4, 2), (8, 2, 4, 1), (8, 8, 4, 4), (12, 4, 3, 2), (256, 8, 8, 4)],
)
def test_choice_equals_sorting(experts: int, top_k: int, groups: int, kept: int, shift: float) -> None:
    """With shift -3 all biased affinities are negative: a mask of 0 would prefer dropped groups."""
    affinities = draw(40, experts).sigmoid()
    bias = draw(experts, seed=1) * 0.3 + shift
    got = choose_experts(affinities, bias, top_k, groups, kept)
    assert got.dtype == torch.int64 and got.shape == (40, top_k)
    assert as_sets(got) == slow_choice(affinities, bias, top_k, groups, kept)


def test_a_group_is_scored_by_the_sum_of_its_best_two() -> None:
    # The first has the best expert, the second the best pair, the third the best sum of all.
    affinities = torch.tensor([[0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.0, 0.0, 0.5, 0.5, 0.5, 0.5]])
    assert as_sets(choose_experts(affinities, torch.zeros(12), 2, 3, 1)) == [{4, 5}]


def test_the_bias_counts_in_the_score_of_a_group() -> None:
    affinities = torch.tensor([[0.6, 0.6, 0.5, 0.5]])
    bias = torch.tensor([0.0, -0.3, 0.0, 0.0])
    assert as_sets(choose_experts(affinities, torch.zeros(4), 2, 2, 1)) == [{0, 1}]
    assert as_sets(choose_experts(affinities, bias, 2, 2, 1)) == [{2, 3}]


@pytest.mark.parametrize("groups", [1, 4])
def test_with_ties_everywhere_the_choice_is_distinct_and_within_kept_groups(groups: int) -> None:
    chosen = as_sets(choose_experts(torch.full((5, 8), 0.5), torch.zeros(8), 4, groups, min(2, groups)))
    size = 8 // groups
    assert all(len({expert // size for expert in row}) <= 2 or groups == 1 for row in chosen)
    assert all(len(row) == 4 for row in chosen)


def test_equal_tokens_are_routed_alike() -> None:
    ids = choose_experts(torch.full((64, 16), 0.25), torch.zeros(16), 3, 4, 2)
    assert (ids == ids[0]).all()


def test_gate_weights_are_unbiased_affinities_renormalised_over_the_chosen_and_scaled() -> None:
    logits = draw(20, 8)
    router, x = router_from(logits, top_k=3, num_groups=4, num_groups_kept=2, scaling_factor=2.5)
    router.bias.copy_(draw(8, seed=1))
    weights, ids, _ = router(x)
    for token in range(20):
        scores = [1 / (1 + math.exp(-logits[token, e].item())) for e in ids[token].tolist()]
        wanted = [2.5 * score / sum(scores) for score in scores]
        assert weights[token].tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_weights_keep_their_true_ratio_when_all_chosen_sigmoids_underflow(dtype: torch.dtype) -> None:
    """No 0/0 and no epsilon: e^-200 is 0 in FP32, yet the ratio of e^-200 and e^-201 is e."""
    base = -800.0 if dtype == F64 else -200.0
    logits = torch.tensor([[base, base - 1.0, base - 50.0, base - 50.0]], dtype=F64)
    router, x = router_from(logits, dtype, top_k=2)
    router.bias.copy_(torch.tensor([2.0, 2.0, 0.0, 0.0]))
    x.requires_grad_()
    weights, ids, balance = router(x)
    got = dict(zip(ids[0].tolist(), weights[0].tolist(), strict=True))
    assert got[0] / got[1] == pytest.approx(math.e, rel=1e-5)
    assert sum(got.values()) == pytest.approx(1.0, rel=1e-6)
    assert torch.isfinite(balance)
    (weights.square().sum() + balance).backward()
    assert x.grad is not None and torch.isfinite(x.grad).all() and x.grad.any()


def test_gradients_of_gate_weights_reach_input_and_weight_but_never_the_bias() -> None:
    router = Router(5, 8, 3, 4, 2, 2.5, dtype=F64)
    with torch.no_grad():
        router.weight.copy_(draw(8, 5))
    router.bias.copy_(draw(8, seed=1) * 0.3)
    x = draw(2, 4, 5, seed=2, grad=True)

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        weights, _, balance = torch.func.functional_call(router, {"weight": weight}, x)
        return weights, balance

    assert torch.autograd.gradcheck(run, (x, router.weight))
    assert not router.bias.requires_grad
    assert "bias" not in dict(router.named_parameters()) and "bias" in router.state_dict()


@pytest.mark.parametrize("better", [0, 1])
def test_logits_and_bias_are_fp32_in_a_bf16_router(better: int) -> None:
    """Affinities that BF16 cannot tell apart still choose the better expert, with exact weights."""
    router = Router(2, 4, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
        router.weight[better, 1] = 2.0**-9
    x = torch.ones(1, 1, 2, dtype=torch.bfloat16)
    weights, ids, balance = router(x)
    assert ids.item() == better
    assert router.bias.dtype == weights.dtype == balance.dtype == torch.float32


@pytest.mark.parametrize(
    ("sequences", "length", "experts", "top_k"), [(1, 1, 4, 1), (3, 5, 8, 3), (2, 9, 6, 6)]
)
def test_balance_equals_the_loop_over_sequences(
    sequences: int, length: int, experts: int, top_k: int
) -> None:
    logits = draw(sequences * length, experts, grad=True)
    got = sequence_balance(torch.nn.functional.logsigmoid(logits), sequences, top_k)
    parts = [balance_loss(rows, top_k) for rows in logits.sigmoid().split(length)]
    wanted = torch.stack(parts).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    mine, slow = (torch.autograd.grad(value, logits)[0] for value in (got, wanted))
    torch.testing.assert_close(mine, slow, rtol=1e-10, atol=1e-14)


def test_balance_does_not_see_the_bias_nor_the_groups() -> None:
    logits = draw(10, 8)
    plain, x = router_from(logits, top_k=3)
    grouped, _ = router_from(logits, top_k=3, num_groups=4, num_groups_kept=2, scaling_factor=2.5)
    grouped.bias.copy_(draw(8, seed=1) * 5)
    assert not torch.equal(plain(x)[1].sort().values, grouped(x)[1].sort().values)
    assert torch.equal(plain(x)[2], grouped(x)[2])


def test_balance_is_one_when_even_and_experts_over_top_k_when_all_choose_the_same() -> None:
    even = torch.eye(8, dtype=F64) * 1e-6  # a token prefers its own expert by a hair
    assert float(sequence_balance(even, 1, 1)) == pytest.approx(1.0, rel=1e-5)
    same = torch.full((6, 8), -40.0, dtype=F64)
    same[:, :2] = 0.0
    assert float(sequence_balance(same, 2, 2)) == pytest.approx(4.0, rel=1e-10)
