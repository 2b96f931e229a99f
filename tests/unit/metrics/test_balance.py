"""Load figures against their definitions, written out in plain Python."""

import math

import pytest
import torch

from moe_runtime.metrics.balance import (
    dead_experts,
    is_starved,
    load_entropy,
    rank_load_ratio,
    relative_load,
    unchecked_violation,
    violation,
)
from moe_runtime.metrics.window import LoadWindow, TimeWindow

GENERATOR = torch.Generator().manual_seed(0)


def counts_of(layers: int, experts: int) -> torch.Tensor:
    """Counts of which some are zero and some are one."""
    counts = torch.randint(0, 1000, (layers, experts), generator=GENERATOR)
    counts[counts < 200] //= 150
    counts[:, 0] += 7
    return counts


@pytest.mark.parametrize("experts", [1, 2, 8, 64])
def test_the_figures_of_a_layer_are_what_their_definitions_say(experts: int) -> None:
    counts = counts_of(5, experts)
    load = relative_load(counts)
    found = zip(counts.tolist(), violation(load).tolist(), load_entropy(load).tolist(), strict=True)
    for row, uneven, entropy in found:
        total = sum(row)
        mean = total / experts
        assert abs(uneven - (max(row) - mean) / mean) < 1e-12  # rounding of FP64 alone
        nats = -sum(n / total * math.log(n / total) for n in row if n)
        assert abs(entropy - (nats / math.log(experts) if experts > 1 else 1.0)) < 1e-12
    dead = [sum(n < 0.01 * sum(row) / experts for n in row) for row in counts.tolist()]
    assert dead_experts(load).tolist() == dead


def test_the_busiest_rank_is_found_among_contiguous_experts() -> None:
    counts = counts_of(3, 8)
    ratios = rank_load_ratio(relative_load(counts), 4).tolist()
    for row, ratio in zip(counts.tolist(), ratios, strict=True):
        ranks = [sum(row[first : first + 2]) for first in range(0, 8, 2)]
        assert abs(ratio - max(ranks) / (sum(ranks) / 4)) < 1e-12
    assert rank_load_ratio(relative_load(counts), 1).tolist() == pytest.approx([1.0] * 3)


def test_all_tokens_to_one_expert_is_as_uneven_as_it_gets() -> None:
    counts = torch.zeros(1, 8, dtype=torch.int64)
    counts[0, 3] = 100
    load = relative_load(counts)
    assert violation(load).tolist() == [7.0]
    assert load_entropy(load).tolist() == [0.0] and dead_experts(load).tolist() == [7]


def test_a_layer_without_tokens_is_even() -> None:
    load = relative_load(torch.zeros(1, 4, dtype=torch.int64))
    assert load.tolist() == [[1.0] * 4]
    assert violation(load).tolist() == [0.0] and load_entropy(load).tolist() == pytest.approx([1.0])
    assert dead_experts(load).tolist() == [0]


def test_a_window_of_loads_sums_the_last_steps_alone() -> None:
    window, steps = LoadWindow(3, 2, 4), [counts_of(2, 4) for _ in range(8)]
    for number, counts in enumerate(steps, 1):
        window.add(counts)
        assert torch.equal(window.total, sum(steps[max(0, number - 3) : number]))


def test_percentiles_of_step_times_are_of_the_last_steps() -> None:
    window = TimeWindow(200)
    assert window.p50 is None and window.p99 is None
    for step in range(1, 1001):
        window.add(float(step))
    assert (window.p50, window.p99) == (900.5, 998.0)  # of 801 to 1000; 1% of 200 steps are above 998


def test_an_expert_without_tokens_is_starved_unless_its_bias_is_on_the_way_up() -> None:
    load = torch.tensor([[0.0, 0.005, 0.5, 3.495]])
    bias = torch.tensor([[0.4, -0.4, 0.1, -0.1]])
    assert is_starved(load, bias, is_moving=True).tolist() == [[False, True, False, False]]
    assert is_starved(load, bias, is_moving=False).tolist() == [[True, True, False, False]]
    assert is_starved(load, torch.zeros(1, 4), is_moving=True).tolist() == [[True, True, False, False]]


def test_an_overload_is_unchecked_unless_the_bias_of_its_expert_is_on_the_way_down() -> None:
    load = torch.tensor([[3.0, 0.5, 0.5, 0.0], [0.0, 2.0, 1.0, 1.0]]).double()
    bias = torch.tensor([[-0.2, 0.1, 0.1, 0.0], [0.0, 0.3, 0.0, 0.0]])
    assert unchecked_violation(load, bias, is_moving=True).tolist() == [0.0, 1.0]
    assert unchecked_violation(load, bias, is_moving=False).tolist() == [2.0, 1.0]
