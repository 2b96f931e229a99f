"""What every rank of a gloo world runs to compare a MoE layer in rounds with the same layer in one piece.

A case is `case(rank, world_size)`; it makes all its exchanges before it compares.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from moe_comm.dispatcher import Dispatcher
from moe_comm.errors import ReceiveOverflow
from moe_comm.factory import open_dispatcher
from moe_comm import moe_layer
from moe_comm.placement import Placement
from moe_comm.reference import reference_rows_sent
from moe_comm.rounds import LayerInRounds, plan_after
from torch import Tensor

from tests.unit.comm.routings import PATTERNS, Inputs, draw, fullest_office

Case = Callable[[int, int], None]
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
HIDDEN = 5
FEW, MANY = (1, 3), (8, 1000)  # of at most 84 rows for a rank
ROUTINGS = (*PATTERNS, "adversarial", "unchosen")


def routed(routing: str, world: int) -> Inputs:
    """FP64 inputs. adversarial: all choices on the last rank; unchosen: some slots without a choice."""
    drawn = draw(
        routing if routing in PATTERNS else "random",
        world,
        dtype=torch.float64,
        weight_dtype=torch.float64,
        hidden=HIDDEN,
    )
    generator = torch.Generator().manual_seed(2)
    for rank, ids in enumerate(drawn.expert_ids):
        scores = torch.rand(ids.shape, generator=generator)
        if routing == "adversarial":
            drawn.expert_ids[rank] = drawn.num_experts - 3 + scores.argsort(dim=1)
        elif routing == "unchosen":
            drawn.expert_ids[rank] = torch.where(scores < 0.3, -1, ids)
    return drawn


def open_flat(drawn: Inputs, rank: int, world: int, max_rows: int | None) -> Dispatcher:
    """Rows go straight to their rank."""
    return open_dispatcher("alltoall", Placement(drawn.num_experts, world, rank), max_rows=max_rows)


def open_two_hop(drawn: Inputs, rank: int, world: int, max_rows: int | None) -> Dispatcher:
    """Two nodes, rows forwarded inside them."""
    placement = Placement(drawn.num_experts, world, rank, ranks_per_node=world // 2)
    return open_dispatcher("two_hop", placement, max_rows=max_rows)


class Experts:
    """Two matrices with a tanh between, per expert; remembers how many rows each call had."""

    def __init__(self, num_experts: int, first: int, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        drawn = torch.randn(num_experts, 2, HIDDEN, HIDDEN, generator=generator, dtype=torch.float64)
        self.matrices = drawn[first : first + count].clone().requires_grad_()
        self.calls: list[int] = []

    def __call__(self, rows: Tensor, row_weights: Tensor, row_counts: Tensor) -> Tensor:
        self.calls.append(rows.shape[0])
        blocks = zip(rows.split(row_counts.tolist()), self.matrices, strict=True)
        outputs = torch.cat([torch.tanh(block @ inner) @ outer for block, (inner, outer) in blocks])
        return outputs * row_weights[:, None]


@dataclass(frozen=True)
class Outcome:
    """Output and gradients of tokens, weights and parameters; rows of each call of the experts."""

    values: tuple[Tensor, ...]
    calls: list[int]


def _leaves(drawn: Inputs, rank: int) -> tuple[Tensor, Tensor]:
    return drawn.tokens[rank].clone().requires_grad_(), drawn.weights[rank].clone().requires_grad_()


def _experts(dispatcher: Dispatcher) -> Experts:
    placement = dispatcher.placement
    mine = placement.experts_of(placement.ep_rank)
    return Experts(placement.num_experts, mine.start, len(mine))


def through_autograd(dispatcher: Dispatcher, drawn: Inputs, rank: int) -> Outcome:
    """The layer as a plain user runs it."""
    experts = _experts(dispatcher)
    tokens, weights = _leaves(drawn, rank)
    output = moe_layer(dispatcher, tokens, weights, drawn.expert_ids[rank], experts, [experts.matrices])
    output.square().sum().backward()
    return Outcome((output.detach(), tokens.grad, weights.grad, experts.matrices.grad), experts.calls)


def by_hand(dispatcher: Dispatcher, drawn: Inputs, rank: int) -> Outcome:
    """The layer as a pipeline stage runs it; gradients of parameters go to `.grad`."""
    experts = _experts(dispatcher)
    tokens, weights, ids = drawn.tokens[rank], drawn.weights[rank], drawn.expert_ids[rank]
    try:
        dispatcher.dispatch(tokens, weights, ids).wait()
    except ReceiveOverflow as overflow:
        plan = plan_after(overflow, dispatcher, ids)
    layer = LayerInRounds(dispatcher, plan, tokens, weights, ids, experts)
    output = layer.forward()
    found = layer.backward(2 * output)
    assert found.parameters == ()
    return Outcome((output, found.tokens, found.weights, experts.matrices.grad), experts.calls)


def as_in_one_piece(open_kind: Callable, routing: str, max_rows: int, rank: int, world: int) -> None:
    """Rounds change no value and no gradient; each holds at most max_rows; all ranks make as many."""
    drawn = routed(routing, world)
    plain = through_autograd(open_kind(drawn, rank, world, None), drawn, rank)
    bounded = open_kind(drawn, rank, world, max_rows)
    outcomes = [through_autograd(bounded, drawn, rank)]
    rows_sent = reference_rows_sent(drawn.expert_ids, drawn.num_experts)
    fullest = fullest_office(rows_sent, getattr(bounded, "lanes", 1))
    if fullest > max_rows:
        outcomes.append(by_hand(bounded, drawn, rank))
    numbers: list[list[int]] = [[]] * world
    dist.all_gather_object(numbers, [len(outcome.calls) for outcome in outcomes])

    assert plain.calls == [plain.calls[0]]
    assert numbers == [numbers[0]] * world, f"calls of the experts by rank: {numbers}"
    for outcome in outcomes:
        for got, expected in zip(outcome.values, plain.values, strict=True):
            torch.testing.assert_close(got, expected, **CLOSE)
        assert max(outcome.calls) <= max_rows, outcome.calls
        passes = 1 if fullest <= max_rows else 2
        assert sum(outcome.calls) == passes * plain.calls[0]
        assert len(outcome.calls) >= passes * -(-fullest // max_rows)


def all_cases(kinds: tuple[str, ...], bounds: tuple[int, ...]) -> dict[str, Case]:
    """Every case by name."""
    opens = {"flat": open_flat, "two hops": open_two_hop}
    return {
        f"{kind}, {routing}, at most {max_rows}": partial(as_in_one_piece, opens[kind], routing, max_rows)
        for kind in kinds
        for routing in ROUTINGS
        for max_rows in bounds
    }


def run_cases(rank: int, world_size: int, kinds: tuple[str, ...], bounds: tuple[int, ...]) -> dict[str, str]:
    """Run every case; what failed on this rank, by case."""
    failures = {}
    for name, case in all_cases(kinds, bounds).items():
        try:
            case(rank, world_size)
        except AssertionError:
            failures[name] = traceback.format_exc()
    return failures
