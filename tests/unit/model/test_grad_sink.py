"""A weight's sink receives what autograd would have received, now or later."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.model.linear import Linear
from moe_runtime.model.transformer import Transformer
from tests.unit.model.samples import F64, draw, draw_tokens, small_config, small_model

Accumulate = Callable[[Tensor], None]
ALL = RecomputeConfig(norm=True, swiglu=True, mla_up=True)
TIED = {"embed.weight", "head.weight"}  # used by MTP too: summed in another order


class Sinks:
    """Sinks of all weights that are not norm gains; deferrable work waits for `finish` if `later`."""

    def __init__(self, model: Transformer, later: bool) -> None:
        self.later = later
        self.buffers: dict[str, Tensor] = {}
        self.waiting: list[tuple[str, Accumulate]] = []
        self.deferrable: dict[str, set[bool]] = {}
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                self.buffers[name] = torch.zeros_like(parameter)
                self._attach(name, parameter)

    def _attach(self, name: str, parameter: Tensor) -> None:
        def sink(weight: Tensor, accumulate: Accumulate, deferrable: bool) -> None:
            assert weight is parameter
            self.deferrable.setdefault(name, set()).add(deferrable)
            if self.later and deferrable:
                self.waiting.append((name, accumulate))
            else:
                accumulate(self.buffers[name])

        parameter.grad_sink = sink  # type: ignore[attr-defined]

    @torch.no_grad()
    def finish(self) -> None:
        for name, accumulate in self.waiting:
            accumulate(self.buffers[name])


def backward(model: Transformer, tokens: Tensor) -> None:
    losses = model.losses(tokens)
    (losses.loss + 0.3 * losses.loss_mtp + 0.7 * losses.balance).backward()


@pytest.mark.parametrize("recompute", [RecomputeConfig(), ALL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("mtp_depth", [0, 2])
def test_sinks_receive_every_weights_gradient(
    mtp_depth: int, later: bool, recompute: RecomputeConfig
) -> None:
    config = small_config(mtp_depth=mtp_depth)
    tokens = draw_tokens(config, 2, 10)
    plain, sunk = small_model(config, recompute=recompute), small_model(config, recompute=recompute)
    sinks = Sinks(sunk, later)
    backward(plain, tokens)
    backward(sunk, tokens)
    sinks.finish()
    grads = dict(plain.named_parameters())
    for name, parameter in sunk.named_parameters():
        wanted = grads[name].grad
        assert wanted is not None and wanted.any(), name
        if name not in sinks.buffers:
            assert parameter.grad is not None and torch.equal(parameter.grad, wanted), name
            continue
        assert parameter.grad is None, f"{name} reached autograd too"
        if mtp_depth and name in TIED:
            torch.testing.assert_close(sinks.buffers[name], wanted, rtol=1e-13, atol=1e-15)
        else:
            assert torch.equal(sinks.buffers[name], wanted), name


def test_all_weight_gradients_but_those_of_embedding_and_head_can_wait() -> None:
    config = small_config()
    model = small_model(config)
    sinks = Sinks(model, later=True)
    backward(model, draw_tokens(config, 1, 8))
    for name, kinds in sinks.deferrable.items():
        assert kinds == {name not in TIED}, name


def test_a_sink_adds_to_what_its_buffer_holds() -> None:
    config = small_config(mtp_depth=0)
    model, tokens = small_model(config), draw_tokens(config, 2, 8)
    sinks = Sinks(model, later=False)
    backward(model, tokens)
    once = {name: buffer.clone() for name, buffer in sinks.buffers.items()}
    backward(model, tokens)
    for name, buffer in sinks.buffers.items():
        torch.testing.assert_close(buffer, 2 * once[name], rtol=1e-12, atol=1e-14)


def test_a_bf16_weight_gradient_reaches_an_fp32_buffer_unrounded() -> None:
    layer = Linear(6, 5, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.copy_(draw(5, 6))
    buffer = torch.zeros(5, 6)
    layer.weight.grad_sink = lambda weight, accumulate, deferrable: accumulate(buffer)  # type: ignore[attr-defined]
    x, pull = draw(64, 6, seed=1, dtype=torch.bfloat16), draw(64, 5, seed=2, dtype=torch.bfloat16)
    layer(x).backward(pull)
    exact = pull.to(F64).T @ x.to(F64)
    # Products of BF16 numbers in FP32; a gradient rounded to BF16 would be off by 2e-3.
    assert float((buffer.to(F64) - exact).norm() / exact.norm()) < 1e-5
