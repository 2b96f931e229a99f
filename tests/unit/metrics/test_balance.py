"""Load figures against their definition, written out."""

import torch

from moe_runtime.metrics.balance import expert_balance


def test_violation_is_max_over_mean_minus_one_in_each_layer() -> None:
    counts = torch.randint(0, 1000, (5, 8), generator=torch.Generator().manual_seed(0))
    mean = counts.double().mean(dim=1)
    expected = (counts.max(dim=1).values - mean) / mean
    rows = zip(counts.double(), expected.tolist(), expert_balance(counts), strict=True)
    for row, violation, balance in rows:
        assert abs(balance.violation - violation) < 1e-12  # rounding of FP64 alone
        assert abs(balance.load_min - float(row.min() / row.mean())) < 1e-12


def test_all_tokens_to_one_expert_violates_by_the_number_of_experts_less_one() -> None:
    counts = torch.zeros(1, 8, dtype=torch.int64)
    counts[0, 3] = 100
    assert [balance.violation for balance in expert_balance(counts)] == [7.0]


def test_a_layer_without_tokens_is_even() -> None:
    (balance,) = expert_balance(torch.zeros(1, 4, dtype=torch.int64))
    assert (balance.load_max, balance.load_min, balance.violation) == (1.0, 1.0, 0.0)
