"""What every rank of a gloo world runs to compare `AllToAllDispatcher` with the oracle.

A case is `case(rank, world_size)`: it first makes all its exchanges, then compares, so that a failed
comparison leaves no rank waiting. Each returns None or raises; `run_cases` gathers what failed.
"""

import traceback
from collections.abc import Callable, Sequence
from functools import partial

import torch
from moe_comm import autograd
from moe_comm.alltoall import AllToAllDispatcher
from moe_comm.control import HEADER_SIZE
from moe_comm.errors import CommError, InputError, PlacementError, RankDisagreement
from moe_comm.factory import open_dispatcher
from moe_comm.local import LocalDispatcher
from moe_comm.placement import Placement
from moe_comm.record import RecordLayout
from moe_comm.reference import (
    reference_combine,
    reference_dispatch,
    reference_layer,
    reference_rows,
    reference_rows_sent,
)
from moe_comm.traffic import Traffic
from moe_comm.transport_torch import TorchTransport
from torch import Tensor

from tests.unit.comm.routings import PATTERNS, Inputs, draw

Case = Callable[[int, int], None]
EQUAL = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def _open(drawn: Inputs, rank: int, world_size: int, **layout: int) -> AllToAllDispatcher:
    dispatcher = open_dispatcher("auto", Placement(drawn.num_experts, world_size, rank, **layout))
    assert isinstance(dispatcher, AllToAllDispatcher)
    return dispatcher


def _check(pairs: Sequence[tuple[Tensor, Tensor]], **tolerance: float) -> None:
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, **tolerance)


def four_operations(
    pattern: str, dtype: torch.dtype, weight_dtype: torch.dtype, rank: int, world: int
) -> None:
    """Dispatch, combine and both backwards, each equal to the plain loops."""
    drawn = draw(pattern, world, dtype=dtype, weight_dtype=weight_dtype)
    dispatcher = _open(drawn, rank, world)
    received = dispatcher.dispatch(drawn.tokens[rank], drawn.weights[rank], drawn.expert_ids[rank]).wait()
    summed = dispatcher.combine(received.rows, received.handle).wait()
    d_rows = dispatcher.combine_backward(drawn.tokens[rank], received.handle).wait()
    d_tokens, d_weights = dispatcher.dispatch_backward(
        received.rows, received.row_weights, received.handle
    ).wait()

    origins = reference_rows(drawn.expert_ids, drawn.num_experts)
    expected = reference_dispatch(drawn.tokens, drawn.weights, origins)
    counts = [len(ids) for ids in drawn.expert_ids]
    top_k = drawn.expert_ids[0].shape[1]
    sums = reference_combine([rows for rows, _ in expected], origins, counts, top_k)[rank]
    experts = dispatcher.placement.experts_of(rank)
    assert received.row_counts.tolist() == [sum(row.expert == e for row in origins[rank]) for e in experts]
    _check([(received.rows, expected[rank][0]), (received.row_weights, expected[rank][1])], **EQUAL)
    _check([(d_rows, expected[rank][0]), (d_weights, drawn.weights[rank])], **EQUAL)
    # BF16 ties may round either way: one unit in the last place.
    tolerance = {"rtol": 2**-7, "atol": 0.0} if dtype == torch.bfloat16 else EQUAL
    _check([(summed, sums), (d_tokens, sums)], **tolerance)


def layer_gradients(pattern: str, rank: int, world: int) -> None:
    """A layer of linear experts: output and all gradients equal plain autograd over all ranks' tokens."""
    drawn = draw(pattern, world, dtype=torch.float64, weight_dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    matrices = torch.randn(drawn.num_experts, 5, 5, generator=generator, dtype=torch.float64)
    dispatcher = _open(drawn, rank, world)
    experts = dispatcher.placement.experts_of(rank)

    tokens, weights = (
        drawn.tokens[rank].clone().requires_grad_(),
        drawn.weights[rank].clone().requires_grad_(),
    )
    mine = matrices[experts.start : experts.stop].clone().requires_grad_()
    received = autograd.dispatch(dispatcher, tokens, weights, drawn.expert_ids[rank])
    blocks = received.rows.split(received.row_counts.tolist())
    rows = torch.cat([block @ matrix for block, matrix in zip(blocks, mine, strict=True)])
    output = autograd.combine(dispatcher, rows * received.row_weights[:, None], received.handle)
    output.square().sum().backward()

    all_tokens = [value.clone().requires_grad_() for value in drawn.tokens]
    all_weights = [value.clone().requires_grad_() for value in drawn.weights]
    every = matrices.clone().requires_grad_()
    functions = [lambda x, matrix=matrix: x @ matrix for matrix in every]
    expected = reference_layer(all_tokens, all_weights, drawn.expert_ids, functions)
    (sum(out.square().sum() for out in expected) + 0.0 * every.sum()).backward()
    _check([(output, expected[rank]), (mine.grad, every.grad[experts.start : experts.stop])], **CLOSE)
    for got, plain in ((tokens, all_tokens[rank]), (weights, all_weights[rank])):
        _check([(got.grad, torch.zeros_like(plain) if plain.grad is None else plain.grad)], **CLOSE)


def spread_equals_local(dtype: torch.dtype, rank: int, world: int) -> None:
    """The number of ranks changes no bit of the output."""
    drawn = draw("unequal", world, dtype=dtype, weight_dtype=torch.float32)
    outputs = []
    for dispatcher in (_open(drawn, rank, world), LocalDispatcher(drawn.num_experts)):
        received = dispatcher.dispatch(drawn.tokens[rank], drawn.weights[rank], drawn.expert_ids[rank]).wait()
        first = dispatcher.placement.experts_of(dispatcher.placement.ep_rank).start
        scale = torch.arange(first, first + len(received.row_counts)).repeat_interleave(received.row_counts)
        rows = received.rows * (received.row_weights * (1 + scale))[:, None].to(dtype)
        outputs.append(dispatcher.combine(rows, received.handle).wait())
    _check([(outputs[0], outputs[1])], **EQUAL)


def several_in_flight(rank: int, world: int) -> None:
    """Two microbatches and two directions under way at once, waited for in another order."""
    drawn = [
        draw("unequal", world, dtype=torch.float32, weight_dtype=torch.float32, seed=seed) for seed in (0, 1)
    ]
    dispatcher = _open(drawn[0], rank, world)
    inputs = [(d.tokens[rank], d.weights[rank], d.expert_ids[rank]) for d in drawn]
    alone = [dispatcher.dispatch(*given).wait() for given in inputs]
    expected = [dispatcher.combine(received.rows, received.handle).wait() for received in alone]

    started = [dispatcher.dispatch(*given) for given in inputs]
    returning = dispatcher.combine(alone[0].rows, alone[0].handle)
    backward = dispatcher.dispatch_backward(alone[1].rows, alone[1].row_weights, alone[1].handle)
    forward = dispatcher.combine_backward(inputs[0][0], alone[0].handle)
    later = started[1].wait()
    d_rows = forward.wait()
    d_tokens, d_weights = backward.wait()
    summed = returning.wait()
    earlier = started[0].wait()
    _check([(earlier.rows, alone[0].rows), (later.rows, alone[1].rows)], **EQUAL)
    _check([(earlier.row_weights, alone[0].row_weights), (d_rows, alone[0].rows)], **EQUAL)
    _check([(summed, expected[0]), (d_tokens, expected[1]), (d_weights, inputs[1][1])], **EQUAL)


def counted_traffic(pattern: str, rank: int, world: int) -> None:
    """Counted rows and bytes equal what the routing alone predicts, on two nodes."""
    drawn = draw(pattern, world, dtype=torch.bfloat16, weight_dtype=torch.float32)
    dispatcher = _open(drawn, rank, world, ranks_per_node=max(world // 2, 1))
    received = dispatcher.dispatch(drawn.tokens[rank], drawn.weights[rank], drawn.expert_ids[rank]).wait()
    dispatched = dispatcher.traffic.snapshot(reset=True)
    dispatcher.combine(received.rows, received.handle).wait()
    combined = dispatcher.traffic.snapshot(reset=True)
    dispatcher.dispatch_backward(received.rows, received.row_weights, received.handle).wait()
    returned = dispatcher.traffic.snapshot(reset=True)

    node = [other // max(world // 2, 1) for other in range(world)]
    near = [other for other in range(world) if node[other] == node[rank] and other != rank]
    far = [other for other in range(world) if node[other] != node[rank]]
    sent = reference_rows_sent(drawn.expert_ids, drawn.num_experts)
    out = (sent[rank][rank], sum(sent[rank][d] for d in near), sum(sent[rank][d] for d in far))
    back = (sent[rank][rank], sum(sent[s][rank] for s in near), sum(sent[s][rank] for s in far))
    control = 8 * (HEADER_SIZE + dispatcher.placement.local_experts)
    wide = 16  # 5 BF16 are 10 bytes, 2 of padding, 4 of weight
    assert dispatched == Traffic(
        *out, wide * out[1], wide * out[2], control * len(near), control * len(far)
    ), dispatched
    assert combined == Traffic(*back, 10 * back[1], 10 * back[2]), combined
    assert returned == Traffic(*back, wide * back[1], wide * back[2]), returned
    assert RecordLayout(((5, torch.bfloat16), (1, torch.float32))).row_bytes == wide


def _raised(action: Callable[[], object]) -> CommError:
    try:
        action()
    except CommError as error:
        return error
    raise AssertionError("nothing was raised")


def refusals_are_shared(rank: int, world: int) -> None:
    """A mistake of one rank is raised by all, nobody hangs, and the next exchange works."""
    drawn = draw("random", world, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = _open(drawn, rank, world)
    tokens, weights, ids = drawn.tokens[rank], drawn.weights[rank], drawn.expert_ids[rank]
    odd = rank == 1
    bad_ids = _raised(lambda: dispatcher.dispatch(tokens, weights, ids + 99 if odd else ids))
    wider = torch.cat((tokens, tokens), dim=1)
    width = _raised(lambda: dispatcher.dispatch(wider if odd else tokens, weights, ids))
    kind = _raised(lambda: dispatcher.dispatch(tokens.double() if odd else tokens, weights, ids))
    fine = dispatcher.dispatch(tokens, weights, ids)
    fine.wait()
    twice = _raised(fine.wait)
    size = _raised(lambda: AllToAllDispatcher(Placement(world + 1, world + 1), TorchTransport()))
    assert isinstance(bad_ids, InputError if odd else RankDisagreement), bad_ids
    assert ("0.." if odd else "ranks [1] refused") in str(bad_ids), bad_ids
    assert "hidden 5 of torch.float32" in str(width) and "hidden 10" in str(width), width
    assert "torch.float64" in str(kind), kind
    assert "twice" in str(twice), twice
    assert isinstance(size, PlacementError) and f"a group of {world} " in str(size), size


def all_cases() -> dict[str, Case]:
    """Every case by name."""
    cases: dict[str, Case] = {
        f"{pattern} {dtype}": partial(four_operations, pattern, dtype, weight_dtype)
        for pattern in PATTERNS
        for dtype, weight_dtype in zip(DTYPES, (torch.float32, torch.float32, torch.float64), strict=True)
    }
    cases |= {f"gradients {pattern}": partial(layer_gradients, pattern) for pattern in PATTERNS}
    cases |= {f"as local {dtype}": partial(spread_equals_local, dtype) for dtype in DTYPES}
    cases |= {f"traffic {pattern}": partial(counted_traffic, pattern) for pattern in PATTERNS}
    return cases | {"several in flight": several_in_flight, "refusals": refusals_are_shared}


def run_cases(rank: int, world_size: int) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    failures = {}
    for name, case in all_cases().items():
        try:
            case(rank, world_size)
        except AssertionError:
            failures[name] = traceback.format_exc()
    return failures
