"""FP8 linears, SwiGLU and experts against the slow composition, on ragged input too."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_comm.wire.carried import stand_in
from moe_comm.wire.tile import quantise_tiles
from torch import Tensor

from moe_runtime.fp8 import cast
from moe_runtime.fp8.policy import Choice
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.ffn import SwiGLU
from moe_runtime.model.fp8_gated import Fp8Experts, Fp8FeedForward
from moe_runtime.model.fp8_linear import Fp8Multiplier
from moe_runtime.model.fp8_operands import Kit, hang
from moe_runtime.model.recompute import Recomputed
from tests.unit.model import fp8_oracle
from tests.unit.model.samples import draw

F32 = torch.float32
# FP32 products of the same numbers in another order.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
ROLES = {
    "all": Choice(),
    "bf16 wgrad": Choice(wgrad=False),
    "bf16 dgrad": Choice(dgrad=False),
    "bf16 fprop": Choice(fprop=False),
    "fprop alone": Choice(dgrad=False, wgrad=False),
    "wgrad alone": Choice(fprop=False, dgrad=False),
}


def kit_of(choice: Choice = ROLES["all"]) -> Kit:
    return Kit(choice, WeightCasts(), cast)


def leaves(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """FP32 leaves; rows and columns differ in size, so that every tile has its own scale."""
    made = []
    for number, shape in enumerate(shapes):
        spread = torch.exp(1.5 * draw(*shape[:-1], 1, seed=seed + 50 + number, dtype=F32))
        made.append((draw(*shape, seed=seed + number, dtype=F32) * spread).requires_grad_())
    return made


def run(fn: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """The output of fn and the gradients of all inputs, under a gradient of uneven rows."""
    out = fn(*inputs)
    (pull,) = leaves(tuple(out.shape), seed=90)
    grads = torch.autograd.grad(out, inputs, pull.detach(), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads, strict=True)),
    ]


def assert_alike(got: list[Tensor], wanted: list[Tensor]) -> None:
    for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
        scale = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one / max(scale, 1e-30), other / max(scale, 1e-30), **CLOSE, msg=lambda m, n=number: f"{n}: {m}"
        )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(("m", "k", "n"), [(300, 200, 130), (128, 128, 256), (1, 7, 5), (0, 40, 24)])
def test_a_linear_and_its_gradients_are_those_of_the_slow_one(m: int, k: int, n: int, role: str) -> None:
    choice = ROLES[role]
    multiply = Fp8Multiplier(kit_of(choice))
    inputs = leaves((m, k), (n, k))
    wanted = run(lambda x, w: fp8_oracle.linear(x, w, choice), inputs)
    assert_alike(run(lambda x, w: multiply(x, w), inputs), wanted)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("m", [300, 0])
def test_a_feed_forward_and_its_gradients_are_those_of_the_slow_one(m: int, role: str) -> None:
    choice = ROLES[role]
    compute, ffn = Fp8FeedForward(kit_of(choice)), SwiGLU(160, 72, dtype=F32)
    inputs = leaves((m, 160), (144, 160), (160, 72))

    def fast(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        object.__setattr__(ffn.gate_up, "_parameters", {"weight": gate_up})
        object.__setattr__(ffn.down, "_parameters", {"weight": down})
        return compute(ffn, x, None)

    wanted = run(lambda x, g, d: fp8_oracle.ffn(x, g, d, None, choice), inputs)
    assert_alike(run(fast, inputs), wanted)


COUNTS = {"ragged": [5, 0, 130, 1], "idle": [0, 0, 0, 0], "flooded": [0, 200, 0, 0], "aligned": [128] * 4}


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", COUNTS)
def test_experts_and_their_gradients_are_those_of_the_slow_ones(name: str, role: str) -> None:
    counts, choice = torch.tensor(COUNTS[name]), ROLES[role]
    m = int(counts.sum())
    x, gate_up, down = leaves((m, 136), (4, 144, 136), (4, 136, 72))
    weights = draw(m, seed=7, dtype=F32).abs().requires_grad_()
    inputs = [x, weights, gate_up, down]
    wanted = run(lambda *given: fp8_oracle.experts(*given, counts, choice), inputs)
    compute = Fp8Experts(kit_of(choice))
    assert_alike(run(lambda *given: compute(*given, counts), inputs), wanted)


class Sink:
    """Adds weight gradients to FP32 buffers that hold something already, at once or when told."""

    def __init__(self, weights: list[Tensor], later: bool) -> None:
        self.buffers = {id(weight): torch.full_like(weight, 3.0, dtype=F32) for weight in weights}
        self.later, self.waiting = later, []  # type: ignore[var-annotated]
        for weight in weights:
            weight.grad_sink = self  # type: ignore[attr-defined]

    def __call__(self, weight: Tensor, accumulate: Callable[[Tensor], None], deferrable: bool) -> None:
        assert deferrable
        self.waiting.append((self.buffers[id(weight)], accumulate))
        if not self.later:
            self.finish()

    @torch.no_grad()
    def finish(self) -> None:
        for buffer, accumulate in self.waiting:
            accumulate(buffer)
        self.waiting.clear()


@pytest.mark.parametrize("later", [False, True], ids=["now", "later"])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_a_sink_gets_the_weight_gradients_added_in_fp32(kind: str, later: bool) -> None:
    counts = torch.tensor(COUNTS["ragged"])
    x, one, gate_up, down = leaves((136, 136), (72, 136), (4, 144, 136), (4, 136, 72))
    weights = draw(136, seed=7, dtype=F32).abs()
    kit = kit_of()

    def forward() -> Tensor:
        if kind == "linear":
            return Fp8Multiplier(kit)(x, one)
        return Fp8Experts(kit)(x, weights, gate_up, down, counts)

    params = [one] if kind == "linear" else [gate_up, down]
    pull = leaves(tuple(forward().shape), seed=90)[0].detach()
    wanted = torch.autograd.grad(forward(), [x, *params], pull)
    sink = Sink(params, later)
    got = torch.autograd.grad(forward(), [x, *params], pull, allow_unused=True)
    assert torch.equal(got[0], wanted[0]) and not any(grad is not None for grad in got[1:])
    sink.finish()
    for param, grad in zip(params, wanted[1:], strict=True):
        torch.testing.assert_close(sink.buffers[id(param)], grad + 3.0, rtol=1e-6, atol=1e-5)


def bf16_experts() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    counts = torch.tensor(COUNTS["ragged"])
    x, gate_up, down = (
        t.detach().bfloat16().requires_grad_() for t in leaves((136, 136), (4, 144, 136), (4, 136, 72))
    )
    return x, draw(136, seed=7, dtype=F32).abs().requires_grad_(), gate_up, down, counts


def test_rows_and_gradients_that_come_as_tiles_alone_are_not_cast_again() -> None:
    """The same bits as from values that the tiles were cast from, but for dD, whose gradient is retiled."""
    x, weights, gate_up, down, counts = bf16_experts()
    inputs, compute = (weights, gate_up, down), Fp8Experts(kit_of())
    pull = draw(136, 136, seed=90, dtype=torch.bfloat16)
    out = compute(x, *inputs, counts)
    wanted = torch.autograd.grad(out, [x, *inputs], pull)
    rows = stand_in(*quantise_tiles(x.detach(), "pow2"), torch.bfloat16).requires_grad_()
    apart = compute(rows, *inputs, counts)
    assert torch.equal(apart, out)
    d_out = stand_in(*quantise_tiles(pull, "pow2"), torch.bfloat16)
    got = torch.autograd.grad(apart, [rows, *inputs], d_out)
    assert (
        torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1]) and torch.equal(got[2], wanted[2])
    )
    assert float((got[3] - wanted[3]).float().norm() / wanted[3].float().norm()) < 0.02


@pytest.mark.parametrize("shape", [(2, 70, 136), (140, 136)])
def test_tiles_that_a_tensor_carries_are_found_and_not_made(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = leaves(shape, (72, 136))
    multiply = Fp8Multiplier(kit_of())
    wanted = run(lambda x, w: multiply(x, w), [x, weight])
    hang(x, cast.cast_rows(x.detach().reshape(-1, 136)))

    def refuse(*args: Any) -> Any:
        raise AssertionError("cast although the tiles were there")

    monkeypatch.setattr(cast, "cast_rows", refuse)
    got = run(lambda x, w: multiply(x, w), [x, weight])
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.parametrize("gives", ["values", "tiles"])
def test_an_input_made_again_gives_the_same_bits(gives: str) -> None:
    x, weight = leaves((140, 136), (72, 136))
    kit = kit_of()
    multiply = Fp8Multiplier(kit)
    source = multiply.keep(x, 1) if gives == "tiles" else Recomputed(lambda: x.detach())
    wanted = run(lambda x, w: multiply(x, w), [x, weight])
    got = run(lambda x, w: multiply(x, w, source), [x, weight])
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    again = multiply.again(multiply.keep(x, 1).take(), weight)
    assert torch.equal(again, wanted[0])
