import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.rebalance import rebalance
from moe_comm.replicas.relocation import keep_slots

from tests.unit.comm import slot_oracle as oracle
from tests.unit.comm.test_rebalance import log_normal, problems, require_sound

NODES = {"num_nodes": 4, "ranks_per_node": 4, "num_groups": 8}


def drifted(loads: torch.Tensor, by: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return loads * (torch.randn(loads.shape, generator=generator, dtype=torch.float64) * by).exp()


def moves_of(now: torch.Tensor, before: torch.Tensor, num_ranks: int) -> list[int]:
    """Experts that a rank has and had not, by loops over layers and ranks."""
    counts = []
    for line, old in zip(now.tolist(), before.tolist(), strict=True):
        pairs = zip(oracle.ranks_of(line, num_ranks), oracle.ranks_of(old, num_ranks), strict=True)
        counts.append(sum(len(set(held) - set(had)) for held, had in pairs))
    return counts


@pytest.mark.parametrize("form", ["hierarchical", "global"])
def test_nothing_moves_when_loads_stay(form):
    loads = log_normal(5, 64)
    first = rebalance(loads, 80, form=form, **NODES)
    again = rebalance(loads, 80, form=form, previous=first.slot_experts, **NODES)
    assert torch.equal(again.slot_experts, first.slot_experts)
    assert again.moved.tolist() == [0] * 5


@settings(max_examples=12, deadline=None)
@given(problems(), st.sampled_from(["auto", "global"]), st.sampled_from([0.0, 0.05]), st.integers(0, 99))
def test_with_a_previous_placement_the_balance_is_as_good_and_moves_are_counted(problem, form, slack, seed):
    loads, num_slots, sizes = problem
    fresh = rebalance(loads, num_slots, form=form, **sizes)
    others = log_normal(loads.shape[0], loads.shape[1], seed)
    for previous_form in ("auto", "global"):
        previous = rebalance(others, num_slots, form=previous_form, **sizes).slot_experts
        layout = rebalance(loads, num_slots, form=form, previous=previous, slack=slack, **sizes)
        require_sound(loads, layout, sizes["num_groups"])
        allowed = fresh.max_over_mean * (1 + slack) * (1 + 2e-9)
        assert bool((layout.max_over_mean <= allowed).all())
        assert layout.moved.tolist() == moves_of(layout.slot_experts, previous, layout.num_ranks)
        # An expert that stays on its rank stays in its slot, so slots that differ are those that moved.
        assert layout.moved.tolist() == (layout.slot_experts != previous).sum(1).tolist()


@pytest.mark.parametrize("form", ["hierarchical", "global"])
def test_a_little_slack_saves_most_moves_under_a_little_drift(form):
    loads = log_normal(8, 64)
    first = rebalance(loads, 80, form=form, **NODES)
    after = drifted(loads, 0.05)
    fresh = rebalance(after, 80, form=form, **NODES)
    strict = rebalance(after, 80, form=form, previous=first.slot_experts, **NODES)
    loose = rebalance(after, 80, form=form, previous=first.slot_experts, slack=0.03, **NODES)
    naive = sum(moves_of(fresh.slot_experts, first.slot_experts, 16)) / 8
    moved = [float(layout.moved.double().mean()) for layout in (strict, loose)]
    assert moved[1] < naive / 4
    assert moved[1] <= moved[0] < naive
    # The old placement was too unbalanced to be kept as it was.
    assert bool((fresh.max_over_mean * 1.03 < _stale(first, after)).any())


def _stale(layout, loads):
    ratios = [
        oracle.max_over_mean_of(oracle.rank_loads_of(line.tolist(), slots.tolist(), layout.num_ranks))
        for line, slots in zip(loads, layout.slot_experts, strict=True)
    ]
    return torch.tensor(ratios, dtype=torch.float64)


def test_a_placement_that_differs_by_names_of_ranks_only_is_kept():
    loads = log_normal(3, 32, seed=7)
    first = rebalance(loads, 40, ranks_per_node=8)
    renamed = first.slot_experts.view(3, 8, 5).flip(1).reshape(3, 40)
    again = rebalance(loads, 40, ranks_per_node=8, previous=renamed)
    assert torch.equal(again.slot_experts, renamed)


def test_a_hot_expert_gets_its_copy_with_few_moves():
    loads = torch.ones(1, 32, dtype=torch.float64)
    first = rebalance(loads, 40, ranks_per_node=8)
    once = int((first.replicas[0] == 1).nonzero()[0])
    hot = loads.clone()
    hot[0, once] = 4.0
    layout = rebalance(hot, 40, ranks_per_node=8, previous=first.slot_experts, slack=0.1)
    assert int(layout.replicas[0, once]) > 1
    assert 1 <= int(layout.moved[0]) <= 12


def test_stayers_keep_their_slots_and_newcomers_fill_the_rest():
    now = torch.tensor([[5, 2, 9, 1]])
    before = torch.tensor([[1, 7, 2, 8]])
    assert keep_slots(now, before).tolist() == [[1, 5, 2, 9]]
