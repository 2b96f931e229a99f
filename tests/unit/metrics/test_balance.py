"""Load figures against their definition, written out."""

import torch

from moe_runtime.metrics.balance import expert_balance, max_violation


def test_violation_is_the_mean_over_layers_of_max_over_mean_minus_one() -> None:
    counts = torch.randint(0, 1000, (5, 8), generator=torch.Generator().manual_seed(0))
    mean = counts.double().mean(dim=1)
    expected = ((counts.max(dim=1).values - mean) / mean).mean()
    got = max_violation(counts)
    assert got is not None and abs(got - float(expected)) < 1e-12  # rounding of FP64 alone
    for row, balance in zip(counts.double(), expert_balance(counts), strict=True):
        assert abs(balance.load_min - float(row.min() / row.mean())) < 1e-12


def test_all_tokens_to_one_expert_violates_by_the_number_of_experts_less_one() -> None:
    counts = torch.zeros(1, 8, dtype=torch.int64)
    counts[0, 3] = 100
    assert max_violation(counts) == 7.0


def test_a_layer_without_tokens_is_even_and_no_layers_have_no_violation() -> None:
    assert max_violation(torch.zeros(2, 4, dtype=torch.int64)) == 0.0
    assert max_violation(torch.zeros(0, 4, dtype=torch.int64)) is None
