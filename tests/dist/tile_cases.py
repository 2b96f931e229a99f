"""What every rank of a gloo world runs to compare tiles that stay tiles with rows that are decoded.

A case makes all its exchanges before it compares.
"""

from functools import partial

import torch
from moe_comm import moe_layer
from moe_comm.dispatcher import Dispatcher, Received
from moe_comm.wire.carried import carry, decoded, tiles_of
from moe_comm.wire.tile import quantise_tiles
from torch import Tensor

from tests.dist.openings import Case, Setting, SharedGroups
from tests.unit.comm.routings import PATTERNS, Inputs, draw
from tests.unit.comm.tile_readers import TileReader

HIDDEN = 300  # two tiles and a tail
WIDE = 1000.0
MAX_ROWS = 30


def _drawn(pattern: str, world: int) -> Inputs:
    drawn = draw(pattern, world, dtype=torch.bfloat16, weight_dtype=torch.float32, hidden=HIDDEN, seed=5)
    for tokens in drawn.tokens:
        tokens[:, ::7] *= WIDE  # scales that differ from tile to tile
        tokens[2:3, 200] = torch.inf  # one tile of one token is no number
    return drawn


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    kind = {2: torch.int16, 4: torch.int32}[left.element_size()]
    return left.dtype == right.dtype and torch.equal(left.view(kind), right.view(kind))


def _open(setting: Setting, groups: SharedGroups, num_experts: int, keep: bool, **how: int) -> Dispatcher:
    return setting.but(wire="fp8_pow2", keep_tiles=keep, **how).open(num_experts, groups)


def _there_and_back(dispatcher: Dispatcher, drawn: Inputs, rank: int) -> tuple[Received, Tensor]:
    tokens, weights, ids = drawn.of(rank)
    received = dispatcher.dispatch(tokens, weights, ids).wait()
    pull = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(rank)).to(torch.bfloat16)
    return received, dispatcher.combine_backward(pull, received.handle).wait()


def tiles_hold_what_would_be_decoded(pattern: str, setting: Setting, groups: SharedGroups) -> None:
    drawn, rank = _drawn(pattern, groups.size), groups.rank
    plain, plain_grads = _there_and_back(_open(setting, groups, drawn.num_experts, False), drawn, rank)
    kept, kept_grads = _there_and_back(_open(setting, groups, drawn.num_experts, True), drawn, rank)
    assert tiles_of(plain.rows) is None
    for stand_in, values in ((kept.rows, plain.rows), (kept_grads, plain_grads)):
        assert stand_in.shape == values.shape and stand_in.dtype == values.dtype
        assert tiles_of(stand_in) is not None and bool(stand_in.isnan().all())
        assert same_bits(decoded(stand_in), values)
    assert torch.equal(kept.row_weights, plain.row_weights)
    assert torch.equal(kept.row_counts, plain.row_counts)


def _layer(dispatcher: Dispatcher, drawn: Inputs, rank: int) -> tuple[list[Tensor], TileReader]:
    placement = dispatcher.placement
    mine = placement.experts_of(placement.ep_rank)
    experts = TileReader(placement.num_experts, mine.start, len(mine), HIDDEN, torch.bfloat16)
    tokens, weights, ids = drawn.of(rank)
    tokens, weights = (x.clone().nan_to_num(1.0, 1.0, 1.0).requires_grad_() for x in (tokens, weights))
    output = moe_layer(dispatcher, tokens, weights, ids, experts, [experts.matrices])
    output.float().square().sum().backward()
    return [output.detach(), tokens.grad, weights.grad, experts.matrices.grad], experts


def a_layer_and_its_gradients_are_the_same(
    pattern: str, max_rows: int | None, setting: Setting, groups: SharedGroups
) -> None:
    drawn, rank = _drawn(pattern, groups.size), groups.rank
    how = {} if max_rows is None else {"max_rows": max_rows}
    wanted, plain = _layer(_open(setting, groups, drawn.num_experts, False, **how), drawn, rank)
    found, kept = _layer(_open(setting, groups, drawn.num_experts, True, **how), drawn, rank)
    assert all(same_bits(x, y) for x, y in zip(found, wanted, strict=True))
    assert not any(plain.rows_had_tiles + plain.grads_had_tiles)
    assert all(kept.rows_had_tiles + kept.grads_had_tiles) and kept.grads_had_tiles
    assert len(kept.rows_had_tiles) == len(plain.rows_had_tiles)
    if pattern == "adversarial" and max_rows is not None:
        assert len(kept.grads_had_tiles) > 1, "expected several rounds"


def tokens_that_carry_tiles_are_not_cast_again(pattern: str, setting: Setting, groups: SharedGroups) -> None:
    """Their tiles here are of other values, which is how one sees what was sent."""
    drawn, rank = _drawn(pattern, groups.size), groups.rank
    other = Inputs([-x for x in drawn.tokens], drawn.weights, drawn.expert_ids, drawn.num_experts)
    dispatcher = _open(setting, groups, drawn.num_experts, True)
    wanted = dispatcher.dispatch(*other.of(rank)).wait()
    tokens, weights, ids = drawn.of(rank)
    carry(tokens, *quantise_tiles(other.tokens[rank], "pow2"))
    found = dispatcher.dispatch(tokens, weights, ids).wait()
    assert same_bits(decoded(found.rows), decoded(wanted.rows))


def all_cases(thorough: bool) -> dict[str, Case]:
    """Cases by name; of `thorough` ones all that `routings` knows, else the most ragged."""
    cases: dict[str, Case] = {}
    for pattern in PATTERNS if thorough else ("unequal", "idle_rank", "masked", "zero_tokens"):
        cases[f"rows, {pattern}"] = partial(tiles_hold_what_would_be_decoded, pattern)
        cases[f"layer, {pattern}"] = partial(a_layer_and_its_gradients_are_the_same, pattern, None)
    for pattern in PATTERNS if thorough else ("adversarial",):
        cases[f"rounds, {pattern}"] = partial(a_layer_and_its_gradients_are_the_same, pattern, MAX_ROWS)
    cases["cast before"] = partial(tokens_that_carry_tiles_are_not_cast_again, "unequal")
    return cases
