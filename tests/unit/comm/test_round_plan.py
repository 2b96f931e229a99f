"""Cutting an exchange into rounds: nothing lost, nobody overloaded, and few rounds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.errors import CommError, CountMismatch
from moe_comm.placement import Placement
from moe_comm.round_plan import plan_rounds, share_out
from moe_comm.routing import plan_send
from torch import Tensor

from tests.unit.comm.routings import PATTERNS, draw


def _rows_sent(expert_ids: list[Tensor], num_experts: int) -> Tensor:
    """int64 [ranks, ranks] rows of each source for each destination, by plain counting."""
    ranks = len(expert_ids)
    rows = torch.zeros((ranks, ranks), dtype=torch.int64)
    for source, ids in enumerate(expert_ids):
        for expert in ids.flatten().tolist():
            if expert >= 0:
                rows[source, expert // (num_experts // ranks)] += 1
    return rows


def _loads(rows: Tensor, lanes: int) -> dict[str, int]:
    """Most rows that any rank sends, receives and forwards, by plain counting."""
    ranks = rows.shape[0]
    forwarded = [0] * ranks
    for source in range(ranks):
        for destination in range(ranks):
            node_start = destination // lanes * lanes
            forwarded[node_start + source % lanes] += int(rows[source, destination])
    return {
        "sends": int(rows.sum(1).max()),
        "receives": int(rows.sum(0).max()),
        "forwards": max(forwarded),
    }


@st.composite
def exchanges(draw_from: st.DrawFn) -> tuple[Tensor, int, int]:
    ranks, lanes = draw_from(
        st.sampled_from([(1, 1), (2, 1), (3, 1), (4, 2), (4, 1), (6, 3), (8, 2), (8, 4)])
    )
    counts = draw_from(st.lists(st.integers(0, 20), min_size=ranks * ranks, max_size=ranks * ranks))
    return torch.tensor(counts).view(ranks, ranks), draw_from(st.integers(1, 60)), lanes


@settings(max_examples=150, deadline=None)
@given(exchanges())
def test_rounds_add_up_and_no_rank_has_more_than_max_rows_in_any_office(given_exchange):
    rows_sent, max_rows, lanes = given_exchange
    rounds = list(share_out(rows_sent, max_rows, lanes))
    assert torch.equal(sum(rounds, torch.zeros_like(rows_sent)), rows_sent)
    for taken in rounds:
        assert int(taken.min()) >= 0 and bool(taken.any())
        assert max(_loads(taken, lanes).values()) <= max_rows
    alone = {office: -(-load // max_rows) for office, load in _loads(rows_sent, lanes).items()}
    bound = alone["sends"] + alone["receives"] + (alone["forwards"] if lanes > 1 else 0)
    assert max(alone.values()) <= len(rounds) <= max(bound, 0)


@pytest.mark.parametrize("lanes", [1, 2])
def test_everything_for_one_rank_takes_just_the_rounds_that_this_rank_needs(lanes):
    rows_sent = torch.zeros((4, 4), dtype=torch.int64)
    rows_sent[:, 2] = torch.tensor([100, 90, 110, 100])
    # Each forwarder of the node holds half of what arrives there, less than the destination.
    assert len(list(share_out(rows_sent, 50, lanes))) == 8


def test_what_fits_is_one_round():
    rows_sent = torch.tensor([[3, 4], [4, 3]])
    assert [taken.tolist() for taken in share_out(rows_sent, 7)] == [rows_sent.tolist()]


@pytest.mark.parametrize("max_rows", [1, 2, 5, 1000])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_chosen_slot_is_in_one_round_and_the_rounds_send_what_the_table_says(pattern, max_rows):
    drawn = draw(pattern, 4, dtype=torch.float32, weight_dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    ids = [torch.where(torch.rand(i.shape, generator=generator) < 0.2, -1, i) for i in drawn.expert_ids]
    rows_sent = _rows_sent(ids, drawn.num_experts)
    rounds = list(share_out(rows_sent, max_rows))
    plans = [plan_rounds(ids[r], rows_sent, Placement(drawn.num_experts, 4, r), max_rows) for r in range(4)]
    assert {plan.num_rounds for plan in plans} == {max(len(rounds), 1)}
    sent_in = []
    for index in range(plans[0].num_rounds):
        chosen_ids = [plan.choose(index, own)[1] for plan, own in zip(plans, ids, strict=True)]
        assert all(bool((chosen >= 0).any(dim=1).all()) for chosen in chosen_ids), "a token without a slot"
        sent_in.append(_rows_sent(chosen_ids, drawn.num_experts))
    for index, taken in enumerate(rounds):
        assert torch.equal(sent_in[index], taken), index
    for own, plan in zip(ids, plans, strict=True):
        assert torch.equal(plan.slot_rounds >= 0, own >= 0)


def test_copies_of_a_token_for_one_rank_share_a_round_but_for_those_at_a_border():
    ids = torch.arange(8).repeat(100, 1)
    plan = plan_rounds(ids, torch.tensor([[800, 0], [0, 0]]), Placement(16, 2, 0), 20)
    per_round = [len(plan.choose(index, ids)[0]) for index in range(plan.num_rounds)]
    assert plan.num_rounds == 40 and max(per_round) <= 4, per_round  # 20 rows are 2.5 tokens


def test_a_round_of_a_plan_is_a_plain_exchange_of_its_slots():
    drawn = draw("random", 2, dtype=torch.float32, weight_dtype=torch.float32)
    rows_sent = _rows_sent(drawn.expert_ids, drawn.num_experts)
    plan = plan_rounds(drawn.expert_ids[1], rows_sent, Placement(drawn.num_experts, 2, 1), 4)
    total = torch.zeros(drawn.num_experts, dtype=torch.int64)
    for index in range(plan.num_rounds):
        total += plan_send(plan.choose(index, drawn.expert_ids[1])[1], drawn.num_experts).expert_counts
    assert torch.equal(total, plan_send(drawn.expert_ids[1], drawn.num_experts).expert_counts)


def test_mistakes_are_named():
    ids, placement = torch.tensor([[0, 3]]), Placement(4, 2, 0)
    with pytest.raises(CommError, match="max_rows of at least 1, got 0"):
        plan_rounds(ids, torch.ones((2, 2), dtype=torch.int64), placement, 0)
    with pytest.raises(CountMismatch, match=r"expected rows \[1, 1\] as routed, got \[2, 1\]"):
        plan_rounds(ids, torch.tensor([[2, 1], [1, 1]]), placement, 4)
    with pytest.raises(CommError, match="2 ranks per node do not divide 3"):
        list(share_out(torch.ones((3, 3), dtype=torch.int64), 4, lanes=2))
