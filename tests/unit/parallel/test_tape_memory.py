"""What a stage holds between forward and backward: no more than autograd would, and nothing afterwards."""

import gc
import weakref

import pytest
import torch
from moe_comm.local import LocalDispatcher

from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.clock import Clock
from moe_runtime.parallel.flight import Flight
from moe_runtime.parallel.stage import ObjectiveWeights, StageRunner
from moe_runtime.parallel.weight_grad import WeightGradSink, run_weight_grads
from tests.dist.live_bytes import LiveBytes
from tests.unit.model.samples import draw_tokens, small_config, small_model

WEIGHTS = ObjectiveWeights(1.0, 0.3, 0.01)
SEQ_LEN = 64


def _model() -> tuple[Transformer, torch.Tensor]:
    model = small_model(small_config(mtp_depth=1))
    return model, draw_tokens(model.config, 2, SEQ_LEN + 1 + model.config.mtp_depth)


def _ignored(model: Transformer, tokens: torch.Tensor) -> list[torch.Tensor]:
    """What is there however little is held: weights, tables, tokens, accumulators."""
    for param in model.parameters():
        param.grad_accum = torch.zeros_like(param)  # type: ignore[attr-defined]
    accumulators = [param.grad_accum for param in model.parameters()]  # type: ignore[attr-defined]
    return [*model.parameters(), *model.buffers(), *accumulators, tokens]


def _runner(model: Transformer) -> StageRunner:
    sink = WeightGradSink()
    sink.install(model.parameters())
    dispatcher = LocalDispatcher(model.config.num_experts)
    return StageRunner(model.phases(), dispatcher, sink, lambda layer, ids: None, Clock())


def _held_by_autograd() -> int:
    model, tokens = _model()
    model.losses(tokens)  # fills the tables of the rotary embedding
    with LiveBytes(_ignored(model, tokens)) as meter:
        losses = model.losses(tokens)
        held = meter.now
    assert losses.loss.requires_grad
    return held


@pytest.mark.parametrize("weight_grads", ["now", "spread", "later"])
def test_a_tape_holds_no_more_than_autograd_and_nothing_after_its_backward(weight_grads: str) -> None:
    model, tokens = _model()
    model.losses(tokens)
    runner = _runner(model)
    with LiveBytes(_ignored(model, tokens)) as meter:
        flight = Flight({"tokens": tokens})
        for step in runner.forward_steps(flight, training=True):
            step.run()
        flight.scalars.clear()
        held = meter.now
        for step in runner.backward_steps(flight, WEIGHTS, weight_grads=weight_grads):
            step.run()
        owed = meter.now
        run_weight_grads(flight.weight_grads)
        gone = weakref.ref(flight)
        del flight, step
        left = meter.now
    assert 0.5 * _held_by_autograd() < held <= 1.02 * _held_by_autograd()
    assert owed < held or weight_grads == "later"  # a W to come holds gradients beside inputs
    assert gone() is None, gc.get_referrers(gone())
    assert left == SEQ_LEN * model.config.qk_rope_head_dim // 2 * 16  # the table of the rotary embedding


def test_between_two_phases_only_what_is_read_again_stays_in_the_state() -> None:
    model, tokens = _model()
    runner = _runner(model)
    flight = Flight({"tokens": tokens})
    needed: list[set[str]] = [set()]
    for phase in reversed(runner.phases):
        needed.append((needed[-1] - set(phase.outputs)) | set(phase.inputs))
    after = dict(zip(runner.phases, reversed(needed[:-1]), strict=True))
    for phase, step in zip(runner.phases, runner.forward_steps(flight, training=True), strict=True):
        step.run()
        under_way = set(flight.started)
        assert set(flight.state) | under_way <= after[phase] | under_way, phase.name
