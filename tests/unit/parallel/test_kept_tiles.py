"""Tiles pass a stage's tape, in one piece and in rounds, as they pass autograd."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from moe_comm.local import LocalDispatcher
from moe_comm.wire import codec
from moe_comm.wire.carried import carry, tiles_of
from moe_comm.wire.tile import quantise_tiles
from torch import Tensor

from moe_runtime.model.block import Block
from moe_runtime.model.experts import Experts, expert_ffn
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.flight import Flight
from moe_runtime.parallel.stage import ObjectiveWeights, StageRunner
from moe_runtime.parallel.weight_grad import WeightGradSink
from tests.unit.comm.tile_readers import GradReader, RowReader
from tests.unit.model.samples import draw_tokens, small_config, small_model

WEIGHTS = ObjectiveWeights(1.0, 0.3, 0.01)


@dataclass
class Seen:
    """Whether rows and gradients carried tiles, call by call, and how many casts dispatchers made."""

    had_tiles: list[bool]
    casts: int = 0


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Makes experts read tiles, and tokens carry some."""
    seen = Seen([])
    attend = Block._attend

    def attend_and_cast(self: Block, *inputs: Any) -> tuple[Tensor, ...]:
        resid, ffn_in, *rest = attend(self, *inputs)
        carry(ffn_in, *quantise_tiles(ffn_in.detach().flatten(0, 1), "pow2"))
        return resid, ffn_in, *rest

    def read(self: Experts, rows: Tensor, row_weights: Tensor, counts: Tensor) -> Tensor:
        seen.had_tiles.append(tiles_of(rows) is not None)
        out = expert_ffn(RowReader.apply(rows), row_weights, self.gate_up, self.down, counts)
        return GradReader.apply(out, seen.had_tiles)

    def count(values: Tensor, scales: Any) -> tuple[Tensor, Tensor]:
        seen.casts += 1
        return quantise_tiles(values, scales)

    monkeypatch.setattr(Block, "_attend", attend_and_cast)
    monkeypatch.setattr(Experts, "forward", read)
    monkeypatch.setattr(codec, "quantise_tiles", count)
    return seen


def _gradients(model: Transformer) -> list[Tensor]:
    return [param.grad if param.grad is not None else param.grad_accum for param in model.parameters()]


def _through_stage(model: Transformer, tokens: Tensor, max_rows: int | None, seen: Seen) -> list[Tensor]:
    sink = WeightGradSink()
    sink.install(model.parameters())
    dispatcher = LocalDispatcher(model.config.num_experts, max_rows, keep_tiles=True)
    runner = StageRunner(
        model.phases(), dispatcher, sink, lambda layer, ids: None, Clock(), rounds=max_rows is not None
    )
    flight = Flight({"tokens": tokens})
    for step in runner.forward_steps(flight, training=True):
        step.run()
    assert seen.casts == 0, "what was cast is cast again"
    for step in runner.backward_steps(flight, WEIGHTS, weight_grads="now"):
        step.run()
    return _gradients(model)


@pytest.mark.parametrize("max_rows", [None, 9])
def test_a_stage_gives_the_gradients_of_autograd(max_rows: int | None, seen: Seen) -> None:
    config = small_config(mtp_depth=1)
    tokens = draw_tokens(config, 2, 9)
    plain = small_model(config, dispatcher=LocalDispatcher(config.num_experts, keep_tiles=True))
    losses = plain.losses(tokens)
    assert seen.casts == 0, "what was cast is cast again"
    (losses.loss + 0.3 * losses.loss_mtp + 0.01 * losses.balance).backward()
    assert seen.had_tiles == [True] * 6 and seen.casts == 3, "rows and gradients of three MoE blocks"
    seen.casts = 0
    found = _through_stage(small_model(config), tokens, max_rows, seen)
    in_rounds = max_rows is not None
    assert all(seen.had_tiles) and (seen.casts > 3 if in_rounds else seen.casts == 3)
    for grad, wanted in zip(found, _gradients(plain), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-9, atol=1e-12)
