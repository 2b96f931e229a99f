"""What every rank of a gloo world runs to compare the dispatchers with plain loops.

A case is `case(setting, groups)`: it first makes all its exchanges, then compares.
"""

from collections.abc import Mapping
from functools import partial

import torch
from moe_comm import autograd
from moe_comm.dispatcher import Dispatcher, Received
from moe_comm.local import LocalDispatcher
from moe_comm.reference import reference_dispatch, reference_layer, reference_rows
from moe_comm.wire.codec import WIRES, wire_pair
from torch import Tensor

from tests.dist.openings import Case, Setting, SharedGroups, run_each
from tests.unit.comm.plain_hops import flat_sums, through, two_hop_sums
from tests.unit.comm.routings import PATTERNS, Inputs, draw

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
PLAIN = (torch.float32, torch.float32)


def require_same_bits(**pairs: tuple[Tensor, Tensor]) -> None:
    """Shape, dtype and every bit."""
    for name, (got, expected) in pairs.items():
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype), (name, got, expected)
        same = torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (got, expected)))
        assert same, f"{name}\n got {got}\n expected {expected}"


def expert_numbers(received: Received, dispatcher: Dispatcher) -> Tensor:
    """The global expert of each row."""
    first = dispatcher.placement.experts_of(dispatcher.placement.ep_rank).start
    numbers = torch.arange(first, first + len(received.row_counts))
    return numbers.repeat_interleave(received.row_counts)


def as_if_by_experts(rows: Tensor, row_weights: Tensor, experts: Tensor) -> Tensor:
    """What every expert makes of its rows; differs between experts, element by element."""
    return rows * (row_weights * (1 + 0.37 * experts)).to(rows.dtype)[:, None]


def exchange(setting: Setting, groups: SharedGroups, drawn: Inputs) -> dict[str, Tensor]:
    """What the four operations give on this rank."""
    rank = groups.rank
    dispatcher = setting.open(drawn.num_experts, groups)
    received = dispatcher.dispatch(*drawn.of(rank)).wait()
    experts = expert_numbers(received, dispatcher)
    outputs = as_if_by_experts(received.rows, received.row_weights, experts)
    summed = dispatcher.combine(outputs, received.handle).wait()
    d_rows = dispatcher.combine_backward(drawn.tokens[rank] * 2, received.handle).wait()
    d_row_weights = received.row_weights * (1 + experts).to(received.row_weights.dtype)
    pending = dispatcher.dispatch_backward(outputs, d_row_weights, received.handle)
    d_tokens, d_weights = pending.wait()
    return {
        "rows": received.rows,
        "row_weights": received.row_weights,
        "row_counts": received.row_counts,
        "summed": summed,
        "d_rows": d_rows,
        "d_tokens": d_tokens,
        "d_weights": d_weights,
    }


def expect(setting: Setting, drawn: Inputs, rank: int) -> dict[str, Tensor]:
    """The same by plain loops, with the wire where DSV3 §3.3.3 has it."""
    out_codec, back_codec = wire_pair(setting.wire)
    origins = reference_rows(drawn.expert_ids, drawn.num_experts)
    layout = setting.layout(drawn.num_experts, len(drawn.tokens))
    tokens = [through(out_codec, values) for values in drawn.tokens]
    doubled = [through(out_codec, values * 2) for values in drawn.tokens]
    rows, row_weights = reference_dispatch(tokens, drawn.weights, origins)[rank]
    d_rows, _ = reference_dispatch(doubled, drawn.weights, origins)[rank]
    first = rank * layout.local_experts
    counts = [0] * layout.local_experts
    for row in origins[rank]:
        counts[row.expert - first] += 1

    weights, ids = drawn.weights[rank], drawn.expert_ids[rank]
    outputs = as_if_by_experts(
        tokens[rank].repeat_interleave(ids.shape[1], 0), weights.flatten(), ids.flatten()
    )
    copies = {divmod(slot, ids.shape[1]): row for slot, row in enumerate(outputs)}
    sums = (
        flat_sums(copies, ids, back_codec)
        if setting.kind == "alltoall"
        else two_hop_sums(copies, ids, back_codec, layout)
    )
    summed = torch.stack(sums) if sums else torch.zeros_like(tokens[rank])
    d_weights = torch.where(ids < 0, 0, weights * (1 + ids).to(weights.dtype)).to(weights.dtype)
    return {
        "rows": rows,
        "row_weights": row_weights,
        "row_counts": torch.tensor(counts),
        "summed": summed,
        "d_rows": d_rows,
        "d_tokens": summed,
        "d_weights": d_weights,
    }


def four_operations(
    pattern: str,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    changes: Mapping[str, object],
    setting: Setting,
    groups: SharedGroups,
) -> None:
    """Dispatch, combine and both backwards, each bit for bit that of the plain loops."""
    if "chunks" in changes and setting.kind == "alltoall":
        return  # not read there
    setting = setting.but(**changes)
    hidden = 5 if setting.wire == "auto" else 130  # more than one tile of the FP8 wires
    drawn = draw(pattern, groups.size, dtype=dtype, weight_dtype=weight_dtype, hidden=hidden)
    got = exchange(setting, groups, drawn)
    expected = expect(setting, drawn, groups.rank)
    require_same_bits(**{name: (got[name], expected[name]) for name in expected})


def layer_gradients(pattern: str, setting: Setting, groups: SharedGroups) -> None:
    """Output and gradients of a layer on one pattern."""
    drawn = draw(pattern, groups.size, dtype=torch.float64, weight_dtype=torch.float64)
    require_gradients_of_a_layer(drawn, setting, groups)


def require_gradients_of_a_layer(drawn: Inputs, setting: Setting, groups: SharedGroups) -> None:
    """A layer of linear experts: output and all gradients equal plain autograd over all ranks' tokens.

    Args:
        drawn: FP64 tokens and weights.
    """
    rank, hidden = groups.rank, drawn.tokens[0].shape[1]
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(drawn.num_experts, hidden, hidden, generator=generator, dtype=torch.float64)
    dispatcher = setting.open(drawn.num_experts, groups)
    experts = dispatcher.placement.experts_of(rank)

    tokens, weights = (values.clone().requires_grad_() for values in drawn.of(rank)[:2])
    mine = matrices[experts.start : experts.stop].clone().requires_grad_()
    received = autograd.dispatch(dispatcher, tokens, weights, drawn.expert_ids[rank])
    blocks = received.rows.split(received.row_counts.tolist())
    rows = torch.cat([block @ matrix for block, matrix in zip(blocks, mine, strict=True)])
    output = autograd.combine(dispatcher, rows * received.row_weights[:, None], received.handle)
    output.square().sum().backward()

    all_tokens = [values.clone().requires_grad_() for values in drawn.tokens]
    all_weights = [values.clone().requires_grad_() for values in drawn.weights]
    every = matrices.clone().requires_grad_()
    functions = [lambda x, matrix=matrix: x @ matrix for matrix in every]
    expected = reference_layer(all_tokens, all_weights, drawn.expert_ids, functions)
    (sum(out.square().sum() for out in expected) + 0.0 * every.sum()).backward()
    pairs = [(output, expected[rank]), (mine.grad, every.grad[experts.start : experts.stop])]
    for got, plain in ((tokens, all_tokens[rank]), (weights, all_weights[rank])):
        pairs.append((got.grad, torch.zeros_like(plain) if plain.grad is None else plain.grad))
    for value, wanted in pairs:
        torch.testing.assert_close(value, wanted, **CLOSE)


def as_local_on_the_whole_batch(
    pattern: str, dtype: torch.dtype, setting: Setting, groups: SharedGroups
) -> None:
    """Flat: bit for bit what one rank with all experts makes of the tokens of all; two hops: rows are."""
    rank = groups.rank
    drawn = draw(pattern, groups.size, dtype=dtype, weight_dtype=torch.float32)
    got = exchange(setting, groups, drawn)
    local = LocalDispatcher(drawn.num_experts)
    whole = local.dispatch(*drawn.joined()).wait()
    outputs = as_if_by_experts(whole.rows, whole.row_weights, expert_numbers(whole, local))
    summed = local.combine(outputs, whole.handle).wait()

    counts = whole.row_counts.view(groups.size, -1)
    first = int(counts[:rank].sum())
    mine = slice(first, first + int(counts[rank].sum()))
    start = sum(len(ids) for ids in drawn.expert_ids[:rank])
    own = summed[start : start + len(drawn.expert_ids[rank])]
    require_same_bits(
        rows=(got["rows"], whole.rows[mine]),
        row_weights=(got["row_weights"], whole.row_weights[mine]),
        row_counts=(got["row_counts"], counts[rank]),
    )
    if setting.kind == "alltoall":
        require_same_bits(summed=(got["summed"], own), d_tokens=(got["d_tokens"], own))
    elif dtype == torch.float64:
        torch.testing.assert_close(got["summed"], own, **CLOSE)


def rounded_once_for_each_hop(wire: str, setting: Setting, groups: SharedGroups) -> None:
    """The error of a sum in BF16 is within its bound, and of rows that one rounding each would lose.

    A value rounded to BF16 changes by at most u = 2^-8 of it. Two hops sum three times (experts of a rank,
    ranks of a node, nodes) and round each result once, so no addend y is in the result with more than three
    roundings: |error| <= ((1 + u)^3 - 1) x sum |y|. One hop rounds once. FP32 rows on a BF16 wire: each
    row once in one hop, each partial sum twice in two. FP32 sums of at most 8 add 8 x 2^-24.
    """
    dtype = torch.float32 if wire == "bf16" else torch.bfloat16
    num_experts, top_k, num_tokens = 8 * groups.size, 8, 12
    generator = torch.Generator().manual_seed(3 + groups.rank)
    ids = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=1).indices
    ids[0] = torch.arange(top_k)  # all experts of one rank
    ids[1] = torch.arange(top_k) * (num_experts // top_k)  # of as many as there are
    tokens = torch.randn(num_tokens, 64, generator=generator).bfloat16().to(dtype)
    weights = torch.rand(num_tokens, top_k, generator=generator).bfloat16().float()
    # Behind a 1 each of these is less than half a unit of BF16: sums made in BF16 would lose all seven.
    tokens[:2], weights[:2], weights[:2, 0] = 1.0, 0.99 * 2**-8, 1.0
    dispatcher = setting.but(wire=wire).open(num_experts, groups)
    received = dispatcher.dispatch(tokens, weights, ids).wait()
    outputs = received.rows * received.row_weights.to(dtype)[:, None]
    summed = dispatcher.combine(outputs, received.handle).wait()

    addends = (tokens[:, None] * weights.to(dtype)[:, :, None]).double()
    roundings = 1 if setting.kind == "alltoall" else 2 if wire == "bf16" else 3
    bound = ((1 + 2**-8) ** roundings - 1 + 2**-21) * addends.abs().sum(1)
    error = (summed.double() - addends.sum(1)).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} of the bound"


def more_experts_than_int16_counts(setting: Setting, groups: SharedGroups) -> None:
    """Expert numbers beyond 32,767 arrive whole, though short ones travel in two bytes."""
    num_experts = 12_000 * groups.size
    for highest in (2**15, num_experts):
        top = torch.tensor([[highest - 1, 0], [highest // 2, highest - 1]]).remainder(num_experts)
        drawn = Inputs(
            tokens=[torch.full((2, 3), 1.0 + rank) for rank in range(groups.size)],
            weights=[torch.tensor([[0.5, 2.0], [1.0, -1.0]])] * groups.size,
            expert_ids=[top] * groups.size,
            num_experts=num_experts,
        )
        got, expected = exchange(setting, groups, drawn), expect(setting, drawn, groups.rank)
        require_same_bits(**{name: (got[name], expected[name]) for name in expected})


def odd_strides(setting: Setting, groups: SharedGroups) -> None:
    """Columns of a wider tensor, transposed and expanded tensors give what their copies give."""
    rank = groups.rank
    drawn = draw("masked", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    tokens, weights, ids = drawn.of(rank)
    dispatcher = setting.open(drawn.num_experts, groups)
    plain = dispatcher.dispatch(tokens, weights, ids).wait()
    odd = dispatcher.dispatch(_transposed(tokens), _in_wider(weights), _in_wider(ids)).wait()
    ones, one_weights = torch.ones_like(plain.rows), torch.ones_like(plain.row_weights)
    same = ones[:1, :1] if len(ones) else torch.ones(1, 1)
    pairs = {"rows": (odd.rows, plain.rows), "row_weights": (odd.row_weights, plain.row_weights)}
    for name, rows in (("transposed", _transposed(plain.rows)), ("wider", _in_wider(plain.rows))):
        got, expected = (dispatcher.combine(r, plain.handle).wait() for r in (rows, plain.rows))
        pairs[name] = got, expected
    spread = same.expand(ones.shape), one_weights[:0].new_ones(1).expand(one_weights.shape)
    got_both = dispatcher.dispatch_backward(*spread, plain.handle).wait()
    both = dispatcher.dispatch_backward(ones, one_weights, plain.handle).wait()
    pairs |= {"d_tokens": (got_both[0], both[0]), "d_weights": (got_both[1], both[1])}
    d_rows = dispatcher.combine_backward(torch.ones(1, 1).expand(tokens.shape), plain.handle).wait()
    pairs["d_rows"] = d_rows, ones
    require_same_bits(**pairs)


def _transposed(values: Tensor) -> Tensor:
    return values.t().contiguous().t()


def _in_wider(values: Tensor) -> Tensor:
    return torch.cat((values, values), dim=1)[:, : values.shape[1]]


def all_cases(thorough: bool) -> dict[str, Case]:
    """Every case by name; each runs with every setting.

    Args:
        thorough: every pattern with every dtype, not with one of them in turn; and what takes seconds.
    """
    kinds = tuple(zip(DTYPES, WEIGHT_DTYPES, strict=True))
    cases: dict[str, Case] = {
        f"{pattern} {dtype}": partial(four_operations, pattern, dtype, weight_dtype, {})
        for index, pattern in enumerate(PATTERNS)
        for dtype, weight_dtype in (kinds if thorough else (kinds[index % 3],))
    }
    cases |= {
        f"{pattern} in {chunks} chunks": partial(four_operations, pattern, *PLAIN, {"chunks": chunks})
        for pattern in ("few", "unequal", "masked", "zero_tokens")
        for chunks in ((1, 2, 3, 7, 40) if thorough else (1, 3, 7))
    }
    cases |= {
        f"wire {wire} {dtype}": partial(four_operations, "masked", dtype, torch.float32, {"wire": wire})
        for wire in WIRES[1:]
        for dtype in ((*DTYPES, torch.float16) if thorough else (torch.float32, torch.bfloat16))
    }
    cases |= {
        f"unconfirmed {pattern}": partial(four_operations, pattern, *PLAIN, {"confirm": False})
        for pattern in ("unequal", "zero_tokens", "adversarial")
    }
    of_gradients = PATTERNS if thorough else ("random", "unequal", "zero_tokens", "adversarial", "masked")
    cases |= {f"gradients {pattern}": partial(layer_gradients, pattern) for pattern in of_gradients}
    cases |= {
        f"as local {pattern} {dtype}": partial(as_local_on_the_whole_batch, pattern, dtype)
        for index, pattern in enumerate(PATTERNS if thorough else ("unequal", "masked", "adversarial"))
        for dtype in (DTYPES if thorough else (DTYPES[index],))
    }
    cases |= {f"roundings {wire}": partial(rounded_once_for_each_hop, wire) for wire in ("auto", "bf16")}
    if thorough:
        cases["many experts"] = more_experts_than_int16_counts
    return cases | {"odd strides": odd_strides}


def run_cases(rank: int, world_size: int, thorough: bool) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    return run_each(all_cases(thorough), world_size)
