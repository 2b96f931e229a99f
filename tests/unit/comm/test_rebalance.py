import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.errors import PlacementError
from moe_comm.rebalance import ExpertLayout, describe_rebalance, rebalance, split_load
from moe_comm.replicas.packing import even_out, rank_loads, shares_of

from tests.unit.comm import slot_oracle as oracle


def log_normal(layers: int, experts: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(layers, experts, generator=generator, dtype=torch.float64).exp()


@st.composite
def problems(draw):
    """Loads and the arguments of `rebalance`, whole groups on nodes possible."""
    nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    groups = nodes * draw(st.integers(1, 2))
    experts = groups * draw(st.integers(1, 4))
    ranks = nodes * ranks_per_node
    most = experts // nodes
    least = -(-experts // ranks)
    num_slots = ranks * draw(st.integers(least, max(least, most)))
    load = st.one_of(st.integers(0, 3), st.integers(0, 10_000))
    rows = st.lists(load, min_size=experts, max_size=experts)
    loads = torch.tensor(draw(st.lists(rows, min_size=1, max_size=3)))
    sizes = {"num_nodes": nodes, "ranks_per_node": ranks_per_node, "num_groups": groups}
    return loads, num_slots, sizes


def require_sound(loads: torch.Tensor, layout: ExpertLayout, num_groups: int) -> None:
    """Everything that a layout claims, checked by loops."""
    for layer, slots in enumerate(layout.slot_experts.tolist()):
        num_experts, ranks, nodes = loads.shape[1], layout.num_ranks, layout.num_nodes
        assert not oracle.faults_of(slots, num_experts, ranks)
        if layout.form == "hierarchical":
            assert not oracle.group_faults_of(slots, num_experts, nodes, num_groups)
        copies = Counter(slots)
        assert layout.replicas[layer].tolist() == [copies[e] for e in range(num_experts)]
        by_rank = oracle.rank_loads_of(loads[layer].tolist(), slots, ranks)
        by_node = [sum(part) for part in oracle.ranks_of(by_rank, nodes)]
        worst = oracle.max_over_mean_of(by_rank)
        assert float(layout.max_over_mean[layer]) == pytest.approx(worst, rel=1e-12)
        assert float(layout.node_max_over_mean[layer]) == pytest.approx(
            oracle.max_over_mean_of(by_node), rel=1e-12
        )
        assert float(layout.bound[layer]) <= worst * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(problems(), st.sampled_from(["auto", "global"]))
def test_a_layout_is_complete_without_doubles_and_what_it_says_of_itself(problem, form):
    loads, num_slots, sizes = problem
    layout = rebalance(loads, num_slots, form=form, **sizes)
    require_sound(loads, layout, sizes["num_groups"])
    wanted = "hierarchical" if form == "auto" and sizes["num_nodes"] > 1 else "global"
    assert layout.form == wanted


def test_the_checks_see_planted_faults():
    assert oracle.faults_of([0, 1, 2, 2], 4, 2) == ["expert 3 is nowhere", "rank 1 holds expert 2 twice"]
    assert oracle.group_faults_of([0, 2, 1, 3], 4, 2, 2) == [
        "group 0 is on nodes [0, 1]",
        "group 1 is on nodes [0, 1]",
        "node 0 has 2 groups",
    ]
    loads, layout = log_normal(1, 8), rebalance(log_normal(1, 8), 12, ranks_per_node=4)
    layout.slot_experts[0, 0] = (layout.slot_experts[0, 0] + 1) % 8
    with pytest.raises(AssertionError):
        require_sound(loads, layout, 1)


@pytest.mark.parametrize(
    ("experts", "slots", "ranks"), [(4, 6, 3), (5, 8, 4), (6, 6, 2), (6, 9, 3), (5, 6, 2), (7, 8, 4)]
)
def test_tiny_instances_are_close_to_the_best_of_all_placements(experts, slots, ranks):
    loads = log_normal(20, experts, seed=1)
    layout = rebalance(loads, slots, ranks_per_node=ranks)
    ratios = []
    for layer in range(20):
        line = loads[layer].tolist()
        best = oracle.best_load(line, slots, ranks) * ranks / sum(line)
        assert float(layout.bound[layer]) <= best * (1 + 1e-9)
        ratios.append(float(layout.max_over_mean[layer]) / best)
    assert min(ratios) > 1 - 1e-9
    # A local search: measured 1.011 on average and 1.09 at worst over 60 draws of each size.
    assert sum(ratios) / 20 < 1.02
    assert max(ratios) < 1.12


def test_tiny_hierarchical_instances_are_close_to_the_best_of_all_groupings():
    loads = log_normal(15, 8, seed=2)
    layout = rebalance(loads, 12, num_nodes=2, ranks_per_node=2, num_groups=4)
    for layer in range(15):
        line = loads[layer].tolist()
        best = oracle.best_load_by_groups(line, 12, 2, 2, 4) * 4 / sum(line)
        assert best * (1 - 1e-9) <= float(layout.max_over_mean[layer]) <= best * 1.06


@pytest.mark.parametrize(
    ("slots", "sizes", "published", "reached", "limit_s"),
    [
        # What the greedy form is known to reach on such loads, and what this one does; seconds allowed.
        (288, {"num_nodes": 4, "ranks_per_node": 8, "num_groups": 8}, 1.08, 1.07, 0.5),
        (288, {"ranks_per_node": 32}, 1.08, 1.001, 0.5),
        (320, {"ranks_per_node": 160}, 1.07, 1.06, 1.0),
        (256, {"ranks_per_node": 8}, 1.01, 1.0005, 0.5),
    ],
)
def test_58_layers_are_balanced_better_than_published_in_a_fraction_of_a_second(
    slots, sizes, published, reached, limit_s
):
    loads = log_normal(58, 256)
    layout, spent_s = timed(loads, slots, sizes)
    assert float(layout.max_over_mean.mean()) < reached < published
    # Only with two slots a rank is anything left to gain, at most: 3.7% as measured.
    assert float((layout.max_over_mean / layout.bound).mean()) < (1.04 if slots == 320 else 1.001)
    assert spent_s < limit_s or timed(loads, slots, sizes)[1] < limit_s


def timed(loads: torch.Tensor, slots: int, sizes: dict) -> tuple[ExpertLayout, float]:
    """A layout and the processor time of one thread that it took, whatever else the machine does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        return rebalance(loads, slots, **sizes), time.process_time() - start
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("slots", "ranks"), [(288, 32), (320, 160), (64, 8)])
def test_no_layer_is_worse_than_by_the_plain_greedy(slots, ranks):
    loads = log_normal(4, 256 if slots > 64 else 60, seed=3)
    layout = rebalance(loads, slots, ranks_per_node=ranks)
    for layer in range(4):
        line = loads[layer].tolist()
        greedy = oracle.rank_loads_of(line, oracle.plain_greedy(line, slots, ranks), ranks)
        assert float(layout.max_over_mean[layer]) <= oracle.max_over_mean_of(greedy) * (1 + 1e-12)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 7),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.9, 1.1, float("inf")]),
)
def test_evening_out_never_makes_the_heaviest_rank_heavier(num_ranks, slots, seed, goal):
    generator = torch.Generator().manual_seed(seed)
    num_experts = 8
    drawn = torch.rand(5, num_ranks, num_experts, generator=generator)
    experts = drawn.topk(slots, dim=2).indices
    shares = torch.randn(5, num_experts, generator=generator, dtype=torch.float64).exp()
    before = rank_loads(experts, shares)
    after_experts = even_out(experts, shares, before.mean(1) * goal)
    after = rank_loads(after_experts, shares)
    assert bool((after.amax(1) <= before.amax(1) * (1 + 1e-12)).all())
    assert all(len(set(rank)) == slots for layer in after_experts.tolist() for rank in layer)
    assert torch.equal(after_experts.flatten(1).sort(1).values, experts.flatten(1).sort(1).values)
    if goal == float("inf"):
        assert torch.equal(after_experts, experts)


def test_the_same_loads_give_the_same_layout_whatever_their_dtype_or_unit():
    counts = (log_normal(6, 64) * 1000).long()
    layouts = [
        rebalance(loads, 72, num_nodes=2, ranks_per_node=4, num_groups=4)
        for loads in (counts, counts.double(), counts.float(), counts * 1024)
    ]
    for other in layouts[1:]:
        assert torch.equal(layouts[0].slot_experts, other.slot_experts)


def test_an_expert_with_all_the_load_gets_a_copy_on_every_rank():
    loads = torch.zeros(2, 8)
    loads[0, 5] = 100.0
    layout = rebalance(loads, 16, ranks_per_node=4)
    assert int(layout.replicas[0, 5]) == 4
    assert float(layout.max_over_mean[0]) == 1.0
    # The other layer has no load at all: still complete, and balance is called perfect.
    assert not oracle.faults_of(layout.slot_experts[1].tolist(), 8, 4)
    assert float(layout.max_over_mean[1]) == float(layout.bound[1]) == 1.0


def test_the_table_of_an_experts_slots_is_the_inverse_of_the_slots():
    layout = rebalance(log_normal(3, 16), 24, ranks_per_node=4)
    table = layout.expert_slots()
    for layer, slots in enumerate(layout.slot_experts.tolist()):
        for expert in range(16):
            listed = [slot for slot in table[layer, expert].tolist() if slot >= 0]
            assert listed == [slot for slot, held in enumerate(slots) if held == expert]


def test_the_split_has_the_loads_of_ranks_before_and_after():
    loads = log_normal(2, 8, seed=4)
    layout = rebalance(loads, 9, ranks_per_node=3)
    split = split_load(loads, layout)
    for layer in range(2):
        line = loads[layer].tolist()
        # 8 experts on 3 ranks in order: 3, 3 and 2.
        plain = [sum(line[0:3]), sum(line[3:6]), sum(line[6:8])]
        assert split.before[layer].tolist() == pytest.approx(plain)
        placed = oracle.rank_loads_of(line, layout.slot_experts[layer].tolist(), 3)
        assert split.after[layer].tolist() == pytest.approx(placed)


def test_the_summary_is_that_of_the_layout():
    loads = log_normal(3, 16, seed=5)
    sizes = {"num_nodes": 2, "ranks_per_node": 2, "num_groups": 4}
    layout, summary = rebalance(loads, 20, **sizes), describe_rebalance(loads, 20, **sizes)
    before = [oracle.max_over_mean_of(line) for line in split_load(loads, layout).before.tolist()]
    assert summary.before == pytest.approx(sum(before) / 3)
    assert summary.before_worst == pytest.approx(max(before))
    assert summary.after == pytest.approx(float(layout.max_over_mean.mean()))
    assert summary.bound <= summary.after < summary.before
    assert (summary.replicas, summary.most_copies) == (4, int(layout.replicas.max()))
    stayed = sum(
        expert // 4 == slot // 5 for line in layout.slot_experts.tolist() for slot, expert in enumerate(line)
    )
    assert summary.moved == 60 - stayed


LOADS = torch.ones(2, 12)
PREVIOUS = torch.arange(12).repeat(2, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_slots": 11}, r"11 slots cannot hold 12 experts; use 12 slots or more"),
        ({"num_slots": 14}, r"14 slots do not divide over 4 ranks; use 12 or 16"),
        ({"num_slots": 13, "ranks_per_node": 4}, r"13 slots do not divide over 8 ranks; use 16$"),
        ({"num_slots": 52}, r"13 slots a rank for 12 experts would hold one twice; use at most 48"),
        ({"num_groups": 5}, r"12 experts do not divide over 5 routing groups"),
        ({"num_groups": 3, "form": "hierarchical"}, r"3 routing groups do not divide over 2 nodes; use form"),
        ({"num_slots": 28, "num_groups": 2, "form": "hierarchical"}, r"7 slots a rank would hold an expert"),
        ({"form": "flat"}, r"auto, hierarchical, global, got 'flat'"),
        ({"ranks_per_node": 0}, r"at least 1 node and 1 rank a node, got 2 and 0"),
        ({"loads": torch.ones(12)}, r"loads \[layers, experts\] of numbers, got torch.float32 \[12\]"),
        ({"loads": -LOADS}, r"finite loads of 0 or more"),
        ({"loads": LOADS * float("nan")}, r"finite loads of 0 or more"),
        ({"slack": -0.1}, r"finite slack of 0 or more, got -0.1"),
        ({"previous": PREVIOUS[:1]}, r"previous int64 \[2, 12\], got torch.int64 \[1, 12\]"),
        ({"previous": PREVIOUS + 1}, r"an expert that is not in 0..11"),
        ({"previous": PREVIOUS // 2 * 2}, r"two copies of one expert on one rank"),
    ],
)
def test_a_mistake_is_refused_in_one_line(arguments, words):
    given_ = {"loads": LOADS, "num_slots": 12, "num_nodes": 2, "ranks_per_node": 2, **arguments}
    with pytest.raises(PlacementError, match=words) as caught:
        rebalance(given_.pop("loads"), given_.pop("num_slots"), **given_)
    assert "\n" not in str(caught.value)


def test_loads_of_another_model_are_refused():
    layout = rebalance(LOADS, 12, ranks_per_node=2)
    with pytest.raises(PlacementError, match=r"loads \[2, 12\] as placed, got \[2, 10\]"):
        split_load(torch.ones(2, 10), layout)


def test_shares_of_absent_experts_are_zero():
    assert shares_of(torch.tensor([[4.0, 3.0]]), torch.tensor([[2, 0]])).tolist() == [[2.0, 0.0]]
