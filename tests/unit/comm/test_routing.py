from itertools import pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.errors import InputError
from moe_comm.routing import Bags, check_inputs, plan_send, regroup, reorder_blocks

CPU = torch.device("cpu")


@st.composite
def choices(draw):
    """(expert_ids int64 [tokens, top_k] with -1 here and there, num_experts)"""
    num_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, num_experts))
    token = st.permutations(list(range(num_experts)) + [-1] * top_k).map(lambda order: order[:top_k])
    tokens = draw(st.lists(token, max_size=12))
    return torch.tensor(tokens, dtype=torch.int64).reshape(len(tokens), top_k), num_experts


@settings(max_examples=100, deadline=None)
@given(choices())
def test_rows_are_sent_by_expert_then_token_and_every_slot_once(drawn):
    ids, num_experts = drawn
    plan = plan_send(ids, num_experts)
    top_k = ids.shape[1]
    flat = ids.reshape(-1).tolist()
    by_hand = sorted((slot for slot, e in enumerate(flat) if e >= 0), key=lambda slot: (flat[slot], slot))
    assert plan.row_slots.tolist() == by_hand
    assert plan.row_tokens.tolist() == [slot // top_k for slot in by_hand]
    rows = [by_hand.index(slot) if expert >= 0 else -1 for slot, expert in enumerate(flat)]
    assert plan.slot_rows.reshape(-1).tolist() == rows
    assert plan.expert_counts.tolist() == [flat.count(e) for e in range(num_experts)]
    bags = [[row for row in rows[t * top_k : (t + 1) * top_k] if row >= 0] for t in range(len(ids))]
    offsets = plan.bags.offsets.tolist()
    assert [plan.bags.indices.tolist()[i:j] for i, j in pairwise(offsets)] == bags
    weights = plan.weights_of_slots(torch.arange(1.0, 1 + len(by_hand)))
    assert weights.reshape(-1).tolist() == [row + 1 if row >= 0 else 0 for row in rows]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_regroup_orders_by_expert_then_source_and_inverts(sources, local_experts, data):
    flat = data.draw(
        st.lists(st.integers(0, 4), min_size=sources * local_experts, max_size=sources * local_experts)
    )
    counts = torch.tensor(flat).view(sources, local_experts)
    arrived = [(e, s, n) for s in range(sources) for e in range(local_experts) for n in range(counts[s, e])]
    moves = regroup(counts, CPU)
    assert [arrived[i] for i in moves.to_expert.tolist()] == sorted(arrived)
    assert moves.to_expert[moves.to_source].tolist() == list(range(len(arrived)))
    assert moves.row_counts.tolist() == counts.sum(0).tolist()


@settings(max_examples=100, deadline=None)
@given(st.permutations(range(3)), st.data())
def test_blocks_are_reordered_whole_and_back(dims, data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)))
    number = shape[0] * shape[1] * shape[2]
    lengths = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=number, max_size=number))).view(
        shape
    )
    rows = [(i, j, k, n) for i, j, k in product(*map(range, shape)) for n in range(lengths[i, j, k])]
    to_new, to_old = reorder_blocks(lengths, dims, CPU)
    moved = sorted(rows, key=lambda row: (*(row[axis] for axis in dims), row[3]))
    assert [rows[i] for i in to_new.tolist()] == moved
    assert [moved[i] for i in to_old.tolist()] == rows


def test_the_radix_order_equals_the_sort_of_many_experts():
    ids = torch.randint(-1, 300, (4096, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plan_send(ids, 300).row_slots, plan_send(ids, 40_000).row_slots)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_sums_are_made_in_order_in_at_least_fp32_and_rounded_once(dtype):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(600, 33, generator=generator).to(dtype)
    slot_rows = torch.randperm(600, generator=generator).view(100, 6)
    wide = torch.promote_types(dtype, torch.float32)
    total = torch.zeros(100, 33, dtype=wide)
    for choice in range(6):
        total += rows[slot_rows[:, choice]].to(wide)
    got = Bags.of(slot_rows).sum(rows)
    assert got.dtype == dtype
    # Nearest: no value of the dtype lies closer to the sum. Ties may go either way, so equality with
    # one rounding rule is too much to ask of BF16.
    assert torch.equal((got.to(wide) - total).abs(), (total.to(dtype).to(wide) - total).abs())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.zeros(2, 3, 4)}, r"tokens \[tokens, hidden >= 1\], got shape \[2, 3, 4\]"),
        ({"tokens": torch.zeros(3, 4, dtype=torch.int32)}, "tokens of a floating dtype .* got torch.int32"),
        ({"weights": torch.zeros(2, 2)}, r"weights \[3, 2\] as expert_ids, got \[2, 2\]"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"expert_ids \[3, top_k\], got shape \[2, 2\]"),
        (
            {"ids": torch.zeros(3, 2, dtype=torch.int32)},
            "expected expert_ids of torch.int64, got torch.int32",
        ),
        ({"ids": torch.full((3, 2), 4)}, r"expert ids in 0\.\.3 \(or -1 for no choice\), got 4"),
        ({"ids": torch.full((3, 2), -2)}, r"expert ids in 0\.\.3 \(or -1 for no choice\), got -2"),
        ({"tokens": torch.zeros(3, 0)}, r"tokens \[tokens, hidden >= 1\], got shape \[3, 0\]"),
        ({"weights": torch.zeros(3, 2, dtype=torch.bool)}, r"weights of a floating dtype .* torch.bool"),
    ],
)
def test_wrong_inputs_are_refused_in_words(change, words):
    fine = {
        "tokens": torch.zeros(3, 4),
        "weights": torch.zeros(3, 2),
        "ids": torch.zeros(3, 2, dtype=torch.int64),
    }
    given = fine | change
    with pytest.raises(InputError, match=words):
        check_inputs(given["tokens"], given["weights"], given["ids"], 4)


def test_no_choice_at_all_is_fine():
    check_inputs(torch.zeros(3, 4), torch.zeros(3, 2), torch.full((3, 2), -1), 4)
    check_inputs(torch.zeros(0, 4), torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.int64), 4)


def test_exact_ties_of_bf16_go_away_from_zero_whatever_the_width():
    """The plain loops of the exchange tests round so; bit equality there rests on it."""
    rows = torch.tensor([1.0, 2**-8, 1 + 2**-7, -1.0, -(2**-8)])[:, None].bfloat16()
    bags = Bags.of(torch.tensor([[0, 1], [2, 1], [3, 4]]))
    for hidden in (1, 3, 8, 16, 33, 130):
        sums = bags.sum(rows.expand(5, hidden).contiguous())
        assert torch.equal(sums, torch.tensor([1 + 2**-7, 1 + 2**-6, -1 - 2**-7])[:, None].expand(3, hidden))
