import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_comm.errors import InputError
from moe_comm.record import RecordLayout
from moe_comm.routing import check_inputs, plan_send, regroup, sum_slots

CPU = torch.device("cpu")


@st.composite
def choices(draw):
    """(expert_ids int64 [tokens, top_k], num_experts)"""
    num_experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, num_experts))
    token = st.permutations(range(num_experts)).map(lambda order: order[:top_k])
    tokens = draw(st.lists(token, max_size=12))
    return torch.tensor(tokens, dtype=torch.int64).reshape(len(tokens), top_k), num_experts


@settings(max_examples=100, deadline=None)
@given(choices())
def test_rows_are_sent_by_expert_then_token_and_every_slot_once(drawn):
    ids, num_experts = drawn
    plan = plan_send(ids, num_experts)
    top_k = ids.shape[1]
    by_hand = sorted(range(ids.numel()), key=lambda slot: (int(ids.reshape(-1)[slot]), slot))
    assert plan.row_slots.tolist() == by_hand
    assert plan.row_tokens.tolist() == [slot // top_k for slot in by_hand]
    assert plan.row_slots[plan.slot_rows].reshape(-1).tolist() == list(range(ids.numel()))
    assert plan.expert_counts.tolist() == [int((ids == e).sum()) for e in range(num_experts)]


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


def test_the_radix_order_equals_the_sort_of_many_experts():
    ids = torch.randint(300, (4096, 4), generator=torch.Generator().manual_seed(0))
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
    got = sum_slots(rows, slot_rows)
    assert got.dtype == dtype
    # Nearest: no value of the dtype lies closer to the sum. Ties may go either way, so equality with
    # one rounding rule is too much to ask of BF16.
    assert torch.equal((got.to(wide) - total).abs(), (total.to(dtype).to(wide) - total).abs())


def test_record_fields_share_a_buffer_and_keep_their_bits():
    layout = RecordLayout(((3, torch.bfloat16), (1, torch.float64), (2, torch.float32)))
    assert layout.row_bytes == 24  # 6 bytes, 2 of padding, 8, 8
    buffer = layout.allocate(4, CPU)
    values = [torch.randn(4, 3).bfloat16(), torch.randn(4, 1).double(), torch.randn(4, 2)]
    for index, value in enumerate(values):
        layout.field(buffer, index).copy_(value)
    for index, value in enumerate(values):
        assert torch.equal(layout.field(buffer, index), value)
    assert torch.equal(layout.whole(buffer)[:, :3], values[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": torch.zeros(2, 3, 4)}, r"tokens \[tokens, hidden\], got shape \[2, 3, 4\]"),
        ({"tokens": torch.zeros(3, 4, dtype=torch.int32)}, "tokens of a floating dtype .* got torch.int32"),
        ({"weights": torch.zeros(2, 2)}, r"weights \[3, 2\] as expert_ids, got \[2, 2\]"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"expert_ids \[3, top_k\], got shape \[2, 2\]"),
        (
            {"ids": torch.zeros(3, 2, dtype=torch.int32)},
            "expected expert_ids of torch.int64, got torch.int32",
        ),
        ({"ids": torch.full((3, 2), 4)}, r"expert ids in 0\.\.3, got 4"),
        ({"ids": torch.full((3, 2), -1)}, r"expert ids in 0\.\.3, got -1"),
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
