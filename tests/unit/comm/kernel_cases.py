"""What the GPU kernels must do, run by Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET once, when a kernel is defined, so these run in a process of their own:
`python -m tests.unit.comm.kernel_cases` runs each function that starts with `case_` and prints
{name: what went wrong, or ""} as JSON. `test_kernels_interpreted.py` starts it and reports each as a test.
"""

import itertools
import json
import traceback
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from moe_comm.errors import InputError
from moe_comm.kernels.layout import SlotLayout, plan_slots
from moe_comm.kernels.permute import gather_rows, permute_quantise, permute_tokens
from moe_comm.kernels.unpermute import narrow, sum_rows, sum_rows_backward
from moe_comm.routing import plan_send
from moe_comm.wire.tile import quantise_tiles
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FILL = 0xA5  # what a buffer holds before a kernel writes into it


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged_ids() -> dict[str, tuple[Tensor, int]]:
    """Expert ids [tokens, top_k] and the number of experts, by what is special about them."""
    random = torch.rand(150, 9, generator=generator()).topk(4, dim=1).indices
    skipping = random.masked_fill(torch.rand(150, 4, generator=generator(1)) < 0.3, -1)
    skipping[17] = -1
    return {
        "three blocks": (random, 9),
        "with skipped choices": (skipping, 9),
        "one expert": (torch.full((40, 1), 6), 7),
        "one expert of one": (torch.zeros(3, 1, dtype=torch.int64), 1),
        "more experts than a histogram has threads": (random * 31, 300),
        "nothing chosen": (torch.full((5, 2), -1), 4),
        "no tokens": (torch.empty(0, 2, dtype=torch.int64), 4),
    }


def slots_of(expert_ids: Tensor, num_experts: int) -> list[int]:
    """The slot of each row, by a loop over experts."""
    flat = expert_ids.flatten().tolist()
    return [slot for expert in range(num_experts) for slot, chosen in enumerate(flat) if chosen == expert]


def slot_rows_with_gaps(num_tokens: int, top_k: int) -> tuple[Tensor, int]:
    """Rows of slots in a random order, a fifth of them absent, one token without any; and their number."""
    chosen = torch.rand(num_tokens, top_k, generator=generator(2)) < 0.8
    chosen[num_tokens // 2] = False
    slot_rows = torch.full((num_tokens, top_k), -1)
    num_rows = int(chosen.sum())
    slot_rows[chosen] = torch.randperm(num_rows, generator=generator(3))
    return slot_rows, num_rows


def record_field(
    num_rows: int, columns: int, dtype: torch.dtype, start: int, gap: int
) -> tuple[Tensor, Tensor]:
    """(records uint8 [num_rows, bytes], the view of a field [num_rows, columns] that begins at `start`)."""
    width = columns * dtype.itemsize
    records = torch.full((num_rows, start + width + gap), FILL, dtype=torch.uint8)
    return records, records[:, start : start + width].view(dtype)


def case_layout_orders_slots_as_a_loop_and_as_plan_send_do() -> None:
    for name, (ids, num_experts) in ragged_ids().items():
        layout = plan_slots(ids, num_experts)
        slots = slots_of(ids, num_experts)
        assert layout.row_slots.shape == (ids.numel(),), name
        assert (layout.row_slots[len(slots) :] == -1).all(), name
        trimmed: SlotLayout = layout.trimmed(len(slots))
        assert trimmed.row_slots.tolist() == slots, name
        assert trimmed.row_tokens.tolist() == [slot // ids.shape[1] for slot in slots], name
        rows = {slot: row for row, slot in enumerate(slots)}
        assert layout.slot_rows.flatten().tolist() == [rows.get(s, -1) for s in range(ids.numel())], name
        counts = [int((ids == expert).sum()) for expert in range(num_experts)]
        assert layout.expert_counts.tolist() == counts, name
        assert layout.expert_offsets.tolist() == [sum(counts[:e]) for e in range(num_experts + 1)], name
        plan = plan_send(ids, num_experts)
        for field in ("row_slots", "row_tokens", "slot_rows", "expert_counts"):
            assert torch.equal(getattr(trimmed, field), getattr(plan, field)), (name, field)


def case_layout_refuses_ids_of_another_dtype() -> None:
    with pytest.raises(InputError, match=r"expected expert_ids int64 \[tokens, top_k\], got torch.int32"):
        plan_slots(torch.zeros(2, 2, dtype=torch.int32), 4)


def case_permute_writes_each_token_to_its_rows_inside_records() -> None:
    slot_rows, num_rows = slot_rows_with_gaps(7, 3)
    for dtype, columns, start in zip(DTYPES, (1030, 5, 600, 257), (4, 0, 16, 8), strict=True):
        tokens = torch.randn(7, columns + 2, generator=generator()).to(dtype)[:, :columns]
        records, rows = record_field(num_rows + 1, columns, dtype, start, gap=8)
        expected = records.clone()
        for token, choices in enumerate(slot_rows.tolist()):
            for row in (choice for choice in choices if choice >= 0):
                expected[row, start : start + columns * dtype.itemsize] = tokens[token].view(torch.uint8)
        assert permute_tokens(tokens, slot_rows, rows) is rows
        assert torch.equal(records, expected), dtype  # the last record, and what is beside the field, too


def case_permute_of_nothing_writes_nothing() -> None:
    rows = torch.ones(2, 6)
    permute_tokens(torch.zeros(0, 6), torch.empty(0, 3, dtype=torch.int64), rows)
    permute_tokens(torch.zeros(4, 6), torch.full((4, 3), -1), rows)
    assert (rows == 1).all()


def case_gather_takes_rows_by_index_and_zeros_for_none() -> None:
    index = torch.randint(-1, 9, (37,), generator=generator())
    index[3] = -1
    for dtype, columns in ((torch.bfloat16, 1030), (torch.float32, 1), (torch.int16, 8), (torch.uint8, 2050)):
        values = torch.randint(0, 100, (9, columns + 1), generator=generator()).to(dtype)[:, :columns]
        expected = torch.stack([values[i] if i >= 0 else torch.zeros_like(values[0]) for i in index.tolist()])
        assert torch.equal(gather_rows(values, index), expected), dtype
        _, target = record_field(37, columns, dtype, start=2 * dtype.itemsize, gap=dtype.itemsize)
        assert gather_rows(values, index, target) is target
        assert torch.equal(target, expected), dtype
    assert gather_rows(values, index[:0]).shape == (0, 2050)


def case_quantised_rows_equal_those_that_are_quantised_first_bit_for_bit() -> None:
    slot_rows, num_rows = slot_rows_with_gaps(6, 3)
    # One piece of 8 tiles and a tail tile of 76; a tile alone; less than a tile.
    for dtype, columns in ((torch.bfloat16, 1100), (torch.float32, 128), (torch.float16, 50)):
        exponents = torch.randint(-30, 30, (6, columns), generator=generator(1)) if dtype != DTYPES[1] else 0
        tokens = torch.randn(6, columns, generator=generator()).ldexp(torch.as_tensor(exponents)).to(dtype)
        tokens[2] = 0.0
        tokens[0, 1], tokens[1, 2] = float("nan"), float("inf")
        for kind, scale_dtype in (("fp32", torch.float32), ("pow2", torch.uint8)):
            expected_codes, expected_scales = quantise_tiles(tokens, kind)
            _, codes = record_field(num_rows, columns, torch.uint8, start=0, gap=12)
            _, scales = record_field(num_rows, expected_scales.shape[1], scale_dtype, start=8, gap=4)
            permute_quantise(tokens, slot_rows, codes, scales)
            for token, choices in enumerate(slot_rows.tolist()):
                for row in (choice for choice in choices if choice >= 0):
                    assert torch.equal(codes[row], expected_codes[token]), (dtype, kind, token)
                    found, expected = (
                        s.float().nan_to_num(-1.0) for s in (scales[row], expected_scales[token])
                    )
                    assert torch.equal(found, expected), (dtype, kind, token)


def loop_sums(rows: Tensor, bags: list[list[int]], weights: list[Tensor] | None) -> Tensor:
    """Sums in order in FP32 or FP64, one rounding at the end."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    sums = torch.zeros(len(bags), rows.shape[1], dtype=wide)
    for bag, members in enumerate(bags):
        for place, row in enumerate(members):
            if row >= 0:
                factor = 1 if weights is None else weights[bag][place].to(wide)
                sums[bag] += rows[row].to(wide) * factor
    return sums.to(rows.dtype)


def ragged_bags(num_rows: int) -> tuple[Tensor, Tensor]:
    """Bags of 5, 0, 1, 9 (more than are read at once), 0 and the rest; rows in a random order."""
    ends = torch.tensor([0, 5, 5, 6, 15, 15, num_rows])
    return torch.randperm(num_rows, generator=generator(4)), ends


def case_sums_of_ragged_bags_equal_a_loop_bit_for_bit() -> None:
    indices, offsets = ragged_bags(21)
    bags = [indices[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    for dtype, columns in zip(DTYPES, (1030, 9, 513, 260), strict=True):
        drawn = torch.randn(21, columns + 3, generator=generator(), dtype=torch.float64)
        rows = drawn.to(dtype)[:, :columns]
        weights = torch.rand(21, generator=generator(5)).to(torch.promote_types(dtype, torch.float32))
        by_bag = [weights[a:b] for a, b in itertools.pairwise(offsets)]
        assert torch.equal(sum_rows(rows, indices, offsets), loop_sums(rows, bags, None)), dtype
        weighted = sum_rows(rows, indices, offsets, weights)
        assert torch.equal(weighted, loop_sums(rows, bags, list(by_bag))), dtype
        backwards = loop_sums(rows, [bag[::-1] for bag in bags], None)
        # In another order the bits differ, so the comparison above is one of order too.
        assert dtype.itemsize == 2 or not torch.equal(sum_rows(rows, indices, offsets), backwards)


def case_sums_of_slot_rows_skip_absent_choices_and_may_be_strided() -> None:
    slot_rows, num_rows = slot_rows_with_gaps(6, 5)
    _, rows = record_field(num_rows, 70, torch.float32, start=4, gap=12)
    rows.copy_(torch.randn(num_rows, 70, generator=generator()))
    weights = torch.rand(6, 5, generator=generator(5))
    weights[slot_rows < 0] = float("nan")  # never read
    _, sums = record_field(6, 70, torch.float32, start=8, gap=4)
    assert sum_rows(rows, slot_rows, weights=weights, sums=sums) is sums
    assert torch.equal(sums, loop_sums(rows, slot_rows.tolist(), list(weights)))
    assert (sums[3] == 0).all()


def case_a_bf16_sum_is_rounded_once_to_nearest_even() -> None:
    # 1 + 2^-8 lies halfway between two BF16 numbers; 2^-8 is lost if it is rounded after each addition.
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8], [2.0**-7], [float("nan")], [-3e38], [-3e38]]).bfloat16()
    bags = torch.tensor([[0, 1, -1], [0, 1, 2], [0, 3, 1], [0, 4, 1], [5, 6, 0]])
    sums = sum_rows(rows, bags).float().flatten()
    assert sums[:3].tolist() == [1.0, 1.0 + 2.0**-7, 1.0 + 2.0**-6]
    assert sums[3].isnan()
    assert sums[4] == float("-inf")


@triton.jit
def narrow_kernel(values: tl.tensor, results: tl.tensor, NUM: tl.constexpr) -> None:
    place = tl.arange(0, NUM)
    tl.store(results + place, narrow(tl.load(values + place), tl.bfloat16))


def case_rounding_to_bf16_equals_that_of_torch_for_every_kind_of_bits() -> None:
    bits = torch.randint(-(2**31), 2**31, (1024,), generator=generator()).to(torch.int32)
    # NaN as a GPU makes it and as others do, infinities, the largest number, ties, subnormals, zeros.
    special = (0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000, 0x7F7FFFFF, 0x3F808000, 0x3F818000, 1, 0)
    bits[: len(special)] = torch.tensor(special, dtype=torch.int32)
    values = bits.view(torch.float32)
    results = torch.empty(1024, dtype=torch.bfloat16)
    narrow_kernel[(1,)](values, results, NUM=1024)
    assert torch.equal(results.isnan(), values.isnan())
    expected = values.bfloat16().view(torch.int16)
    assert torch.equal(results.view(torch.int16)[~values.isnan()], expected[~values.isnan()])


def case_gradients_of_rows_and_weights_equal_those_of_autograd() -> None:
    indices, offsets = ragged_bags(21)
    bag_of = torch.repeat_interleave(torch.arange(6), offsets.diff())
    rows = torch.randn(23, 300, generator=generator(), dtype=torch.float64, requires_grad=True)
    weights = torch.rand(21, generator=generator(5), dtype=torch.float64, requires_grad=True)
    d_sums = torch.randn(6, 300, generator=generator(6), dtype=torch.float64)
    sums = torch.zeros(6, 300, dtype=torch.float64)
    sums.index_add(0, bag_of, rows[indices] * weights[:, None]).backward(d_sums)
    d_rows = torch.zeros(23, 300, dtype=torch.float64)
    d_weights = sum_rows_backward(d_sums, indices, d_rows, offsets, weights.detach(), rows.detach())
    torch.testing.assert_close(d_rows, rows.grad, rtol=0, atol=0)
    torch.testing.assert_close(d_weights, weights.grad, rtol=1e-12, atol=1e-12)  # sums of 300 in FP64


def case_gradients_round_once_and_reach_only_the_rows_of_a_bag() -> None:
    slot_rows, num_rows = slot_rows_with_gaps(5, 3)
    d_sums = torch.randn(5, 1030, generator=generator()).bfloat16()
    rows = torch.randn(num_rows, 1030, generator=generator(1)).bfloat16()
    weights = torch.rand(5, 3, generator=generator(2))
    records, d_rows = record_field(num_rows + 1, 1030, torch.bfloat16, start=4, gap=4)
    expected = records.clone()
    d_weights = sum_rows_backward(d_sums, slot_rows, d_rows, weights=weights, rows=rows)
    for token, choice in (slot_rows >= 0).nonzero().tolist():
        row = slot_rows[token, choice]
        gradient = (d_sums[token].float() * weights[token, choice]).bfloat16()
        expected[row, 4 : 4 + 2060] = gradient.view(torch.uint8)
        exact = float((d_sums[token].double() * rows[row].double()).sum())
        # 1030 products of order 1 in FP32, added as a tree: some 10 roundings of 6e-8 of 30.
        assert abs(float(d_weights[token, choice]) - exact) < 1e-4
    assert torch.equal(records, expected)
    assert (d_weights[slot_rows < 0] == 0).all()
    assert sum_rows_backward(d_sums, slot_rows, d_rows) is None
    plain = torch.zeros_like(rows)
    assert torch.equal(d_rows[:num_rows], permute_tokens(d_sums, slot_rows, plain))


def case_what_does_not_fit_together_is_refused_with_a_name() -> None:
    slots = torch.zeros(3, 2, dtype=torch.int64)
    wrong: list[tuple[str, Callable[[], object]]] = [
        (
            r"rows \[rows, 4\], got shape \[6, 5\]",
            lambda: permute_tokens(torch.ones(3, 4), slots, torch.ones(6, 5)),
        ),
        (
            "rows of torch.float32",
            lambda: permute_tokens(torch.ones(3, 4), slots, torch.ones(6, 4).bfloat16()),
        ),
        (r"slot_rows int64 \[4, top_k\]", lambda: permute_tokens(torch.ones(4, 4), slots, torch.ones(6, 4))),
        ("adjacent columns", lambda: permute_tokens(torch.ones(4, 3).t(), slots, torch.ones(6, 4))),
        (r"index int64 \[6\]", lambda: gather_rows(torch.ones(3, 4), slots[0], torch.ones(6, 4))),
        (
            r"scales \[rows, 1\]",
            lambda: permute_quantise(torch.ones(3, 4), slots, torch.ones(6, 4).byte(), torch.ones(6, 2)),
        ),
        (r"indices int64 \[n\] with offsets", lambda: sum_rows(torch.ones(6, 4), slots, torch.arange(3))),
        (r"weights \[3, 2\]", lambda: sum_rows(torch.ones(6, 4), slots, weights=torch.ones(3))),
        ("d_sums of 3 bags, got 2", lambda: sum_rows_backward(torch.ones(2, 4), slots, torch.ones(6, 4))),
    ]
    for message, call in wrong:
        with pytest.raises(InputError, match=message):
            call()


def case_a_round_trip_returns_each_token_as_often_as_it_was_sent() -> None:
    ids, num_experts = ragged_ids()["with skipped choices"]
    ids = ids[:20]
    tokens = torch.randint(-8, 8, (20, 33), generator=generator()).float()
    layout = plan_slots(ids, num_experts)
    rows = permute_tokens(tokens, layout.slot_rows, torch.full((ids.numel(), 33), float("nan")))
    assert torch.equal(sum_rows(rows, layout.slot_rows), tokens * (ids >= 0).sum(1, keepdim=True))


CASES = {name: case for name, case in list(globals().items()) if name.startswith("case_")}


def main() -> None:
    """Run every case and print what became of it."""
    results = {}
    for name, case in CASES.items():
        try:
            case()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
