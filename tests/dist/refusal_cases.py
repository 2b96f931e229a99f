"""What every rank of a gloo world runs to show that mistakes are told to all ranks, soon, and spoil nothing.

A case is `case(setting, groups)`. The odd rank of each is the last; the others do what is right.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from moe_comm.dispatcher import Dispatcher, Pending, Received
from moe_comm.errors import (
    CommError,
    CountMismatch,
    InputError,
    RankDisagreement,
    ReceiveOverflow,
)
from torch import Tensor

from tests.dist.exchange_cases import require_same_bits
from tests.dist.openings import Case, Setting, SharedGroups, run_each
from tests.unit.comm.routings import Inputs, draw

LIMIT_S = 3.0
Start = Callable[[Dispatcher, Inputs, list[Received], bool], Pending[Any]]


def raised(action: Callable[[], object]) -> CommError:
    """The named error of an action, of one line and within the limit."""
    began = time.perf_counter()
    try:
        action()
    except CommError as error:
        seconds = time.perf_counter() - began
        assert "\n" not in str(error), error
        assert seconds < LIMIT_S, f"{seconds:.1f} s until: {error}"
        return error
    raise AssertionError("nothing was raised")


@dataclass(frozen=True)
class Mistake:
    """One rank does other than the rest.

    Args:
        start: starts the operation, rightly or (last argument) wrongly; has two dispatches that were made.
        words: parts of what all ranks are told; {odd} is the number of the odd rank.
        refused: the error of the odd rank and parts of its words, if its own input is wrong.
    """

    start: Start
    words: tuple[str, ...]
    refused: tuple[type[CommError], str] | None = None


def _tokens(d: Dispatcher, drawn: Inputs, change: Callable[[Tensor], Tensor]) -> Pending[Any]:
    tokens, weights, ids = drawn.of(d.placement.ep_rank)
    return d.dispatch(change(tokens), weights, ids)


def _ids(d: Dispatcher, drawn: Inputs, change: Callable[[Tensor], Tensor]) -> Pending[Any]:
    tokens, weights, ids = drawn.of(d.placement.ep_rank)
    return d.dispatch(tokens, weights, change(ids))


def _fewer_choices(d: Dispatcher, drawn: Inputs, odd: bool) -> Pending[Any]:
    tokens, weights, ids = drawn.of(d.placement.ep_rank)
    return d.dispatch(tokens, weights[:, : 3 - odd], ids[:, : 3 - odd])


def _weights(d: Dispatcher, drawn: Inputs, change: Callable[[Tensor], Tensor]) -> Pending[Any]:
    tokens, weights, ids = drawn.of(d.placement.ep_rank)
    return d.dispatch(tokens, change(weights), ids)


def _back(d: Dispatcher, received: Received, change: Callable[[Tensor], Tensor]) -> Pending[Any]:
    return d.dispatch_backward(received.rows, change(received.row_weights), received.handle)


MISTAKES: dict[str, Mistake] = {
    "hidden": Mistake(
        lambda d, x, made, odd: _tokens(d, x, lambda t: torch.cat((t, t), 1) if odd else t),
        ("dispatch: ", "hidden 5 of torch.float32", "rank 0", "hidden 10", "rank {odd}"),
    ),
    "dtype": Mistake(
        lambda d, x, made, odd: _tokens(d, x, lambda t: t.double() if odd else t),
        ("dispatch: ", "5 of torch.float32", "rank 0", "5 of torch.float64", "rank {odd}"),
    ),
    "weights dtype": Mistake(
        lambda d, x, made, odd: _weights(d, x, lambda w: w.bfloat16() if odd else w),
        ("dispatch: ", "weights of torch.float32", "rank 0", "weights of torch.bfloat16", "rank {odd}"),
    ),
    "top_k": Mistake(
        lambda d, x, made, odd: _fewer_choices(d, x, odd),
        ("dispatch: ", "3 choices", "rank 0", "2 choices", "rank {odd}"),
    ),
    "ids too high": Mistake(
        lambda d, x, made, odd: _ids(d, x, lambda i: i + 99 if odd else i),
        ("dispatch: ", "ranks [{odd}] refused"),
        (InputError, "expected expert ids in 0.."),
    ),
    "ids too low": Mistake(
        lambda d, x, made, odd: _ids(d, x, lambda i: i - 99 if odd else i),
        ("dispatch: ", "ranks [{odd}] refused"),
        (InputError, "or -1 for no choice), got -"),
    ),
    "ids of int32": Mistake(
        lambda d, x, made, odd: _ids(d, x, lambda i: i.int() if odd else i),
        ("dispatch: ", "ranks [{odd}] refused"),
        (InputError, "expert_ids of torch.int64, got torch.int32"),
    ),
    "tokens of one axis": Mistake(
        lambda d, x, made, odd: _tokens(d, x, lambda t: t[:, 0] if odd else t),
        ("dispatch: ", "ranks [{odd}] refused"),
        (InputError, "tokens [tokens, hidden >= 1], got shape [7]"),
    ),
    "rows too few": Mistake(
        lambda d, x, made, odd: d.combine(made[0].rows[odd:], made[0].handle),
        ("combine: ", "ranks [{odd}] refused"),
        (CountMismatch, "combine: expected rows ["),
    ),
    "rows too narrow": Mistake(
        lambda d, x, made, odd: d.combine(made[0].rows[:, odd:], made[0].handle),
        ("combine: ", "ranks [{odd}] refused"),
        (CountMismatch, "as dispatched, got ["),
    ),
    "rows of integers": Mistake(
        lambda d, x, made, odd: d.combine(made[0].rows.int() if odd else made[0].rows, made[0].handle),
        ("combine: ", "ranks [{odd}] refused"),
        (InputError, "rows of a floating dtype"),
    ),
    "rows of another dtype": Mistake(
        lambda d, x, made, odd: d.combine(made[0].rows.half() if odd else made[0].rows, made[0].handle),
        ("combine: ", "torch.float32", "rank 0", "torch.float16", "rank {odd}"),
    ),
    "d_tokens too few": Mistake(
        lambda d, x, made, odd: d.combine_backward(x.tokens[d.placement.ep_rank][odd:], made[0].handle),
        ("combine_backward: ", "ranks [{odd}] refused"),
        (CountMismatch, "expected gradients [7, 5] as combined, got [6, 5]"),
    ),
    "d_row_weights too few": Mistake(
        lambda d, x, made, odd: _back(d, made[0], lambda w: w[odd:]),
        ("dispatch_backward: ", "ranks [{odd}] refused"),
        (CountMismatch, "row weights as dispatched"),
    ),
    "d_row_weights of another dtype": Mistake(
        lambda d, x, made, odd: _back(d, made[0], lambda w: w.double() if odd else w),
        ("dispatch_backward: ", "weights of torch.float32", "rank 0", "torch.float64", "rank {odd}"),
    ),
    "another operation": Mistake(
        lambda d, x, made, odd: (
            d.combine_backward(x.tokens[d.placement.ep_rank], made[0].handle)
            if odd
            else d.combine(made[0].rows, made[0].handle)
        ),
        ("combine as operation 2", "rank 0", "combine_backward as operation 2", "rank {odd}"),
    ),
    "another dispatch first": Mistake(
        lambda d, x, made, odd: (
            d.combine(made[0].rows, made[0].handle) if odd else d.dispatch(*x.of(d.placement.ep_rank))
        ),
        ("dispatch as operation 2", "rank 0", "combine as operation 2", "rank {odd}"),
    ),
    "another handle": Mistake(
        lambda d, x, made, odd: d.combine(made[odd].rows, made[odd].handle),
        ("combine: ", "handle of operation 0", "rank 0", "handle of operation 1", "rank {odd}"),
    ),
}


def is_told_to_all(name: str, setting: Setting, groups: SharedGroups) -> None:
    """A mistake of one rank is raised by all, soon, in words; the next exchange works."""
    if setting.ranks_per_node != max(groups.size // 2, 1):
        return  # what ranks say before an operation does not depend on nodes
    mistake, rank = MISTAKES[name], groups.rank
    is_odd = rank == groups.size - 1
    drawn = [
        draw(p, groups.size, dtype=torch.float32, weight_dtype=torch.float32) for p in ("random", "unequal")
    ]
    dispatcher = setting.open(drawn[0].num_experts, groups)
    made = [dispatcher.dispatch(*d.of(rank)).wait() for d in drawn]
    error = raised(lambda: mistake.start(dispatcher, drawn[0], made, is_odd).wait())
    after = dispatcher.dispatch(*drawn[0].of(rank)).wait()
    summed = [dispatcher.combine(r.rows, r.handle).wait() for r in (made[0], after)]
    require_same_bits(rows=(after.rows, made[0].rows), summed=(summed[1], summed[0]))
    if mistake.refused and is_odd:
        kind, words = mistake.refused
        assert isinstance(error, kind) and words in str(error), repr(error)
        return
    assert isinstance(error, RankDisagreement), repr(error)
    for words in mistake.words:
        assert words.format(odd=groups.size - 1) in str(error), f"{words!r} is not in {error}"


def among_others_under_way(setting: Setting, groups: SharedGroups) -> None:
    """A mistake between good operations spoils none of them, and may be waited for at any time."""
    rank = groups.rank
    drawn = draw("unequal", groups.size, dtype=torch.float32, weight_dtype=torch.float32)
    dispatcher = setting.open(drawn.num_experts, groups)
    good = dispatcher.dispatch(*drawn.of(rank)).wait()
    expected = dispatcher.combine(good.rows, good.handle).wait()
    before = dispatcher.combine(good.rows, good.handle)
    tokens, weights, ids = drawn.of(rank)
    bad = [
        dispatcher.dispatch(tokens, weights, ids if rank else ids + 99),
        dispatcher.combine(good.rows if rank else good.rows[:0, :2], good.handle),
        dispatcher.dispatch_backward(good.rows if rank else good.rows.int(), good.row_weights, good.handle),
    ]
    after = dispatcher.dispatch(*drawn.of(rank))
    again = after.wait()
    errors = [raised(pending.wait) for pending in reversed(bad)]
    summed = before.wait()
    assert [type(e) for e in errors] == (
        [InputError, CountMismatch, InputError] if rank == 0 else [RankDisagreement] * 3
    ), errors
    twice = raised(bad[0].wait)
    assert "twice" in str(twice), twice
    require_same_bits(rows=(again.rows, good.rows), summed=(summed, expected))


def overflow_is_told_to_all(setting: Setting, groups: SharedGroups) -> None:
    """More than max_rows for one rank is refused by all alike, with the table; what fits goes on."""
    rank, size = groups.rank, groups.size
    full = draw("adversarial", size, dtype=torch.float32, weight_dtype=torch.float32)
    fits = draw("few", size, dtype=torch.float32, weight_dtype=torch.float32)
    top_k, tokens = full.expert_ids[0].shape[1], sum(len(ids) for ids in full.expert_ids)
    most = top_k * tokens
    exactly = setting.but(max_rows=most).open(full.num_experts, groups)
    assert exactly.max_rows == most
    assert exactly.dispatch(*full.of(rank)).wait().rows.shape[0] == (most if rank == size - 1 else 0)
    bounded = setting.but(max_rows=most - 1).open(full.num_experts, groups)
    bounded.traffic.snapshot(reset=True)
    error = raised(lambda: bounded.dispatch(*full.of(rank)).wait())
    sent = bounded.traffic.snapshot()
    pending = [bounded.dispatch(*inputs.of(rank)) for inputs in (full, fits, full)]
    received = pending[1].wait()
    for refused in (pending[0], pending[2]):
        assert isinstance(raised(refused.wait), ReceiveOverflow)
    summed = bounded.combine(received.rows, received.handle).wait()

    assert isinstance(error, ReceiveOverflow), repr(error)
    words = f"max_rows {most - 1} rows on a rank, got {most} to receive for expert-parallel rank {size - 1};"
    assert words in str(error), error
    table = torch.zeros((size, size), dtype=torch.int64)
    table[:, -1] = torch.tensor([top_k * len(ids) for ids in full.expert_ids])
    require_same_bits(rows_sent=(error.rows_sent, table))
    assert (sent.rows_self, sent.rows_intra, sent.rows_inter) == (0, 0, 0), sent
    plain = setting.open(fits.num_experts, groups)
    again = plain.dispatch(*fits.of(rank)).wait()
    require_same_bits(
        rows=(received.rows, again.rows), summed=(summed, plain.combine(again.rows, again.handle).wait())
    )


def all_cases() -> dict[str, Case]:
    """Every case by name; each runs with every setting."""
    cases: dict[str, Case] = {name: partial(is_told_to_all, name) for name in MISTAKES}
    plain = (among_others_under_way, overflow_is_told_to_all)
    return cases | {case.__name__: case for case in plain}


def run_cases(rank: int, world_size: int) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    return run_each(all_cases(), world_size)
