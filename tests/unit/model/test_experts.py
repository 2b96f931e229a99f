"""Experts on their rows, dense FFN and the MoE layer against per-token loops."""

import pytest
import torch
from moe_comm import autograd as differentiable
from moe_comm.local import LocalDispatcher
from torch import Tensor

from moe_runtime.config.schema import RecomputeConfig
from moe_runtime.model.experts import Experts, expert_ffn
from moe_runtime.model.ffn import SwiGLU, swiglu
from moe_runtime.model.moe import MoE
from tests.unit.model import oracle
from tests.unit.model.samples import F64, draw, small_config

pytestmark = pytest.mark.usefixtures("nan_memory")

EXPERTS, HIDDEN, WIDTH = 4, 6, 5
COUNTS = [[3, 2, 4, 1], [0, 5, 0, 2], [0, 0, 9, 0], [7, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def slow_experts(
    rows: Tensor, row_weights: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]
) -> Tensor:
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    parts = [
        weight * oracle.swiglu(row, gate_up[e], down[e])
        for row, weight, e in zip(rows, row_weights, owners, strict=True)
    ]
    return torch.stack(parts) if parts else rows


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("counts", COUNTS)
def test_experts_equal_the_loop_over_rows(counts: list[int], recompute: bool) -> None:
    """Also without any row, with experts without rows, and with all rows at one."""
    total = sum(counts)
    leaves = (
        draw(total, HIDDEN, seed=1, grad=True),
        draw(total, seed=2, grad=True),
        draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=3, grad=True),
        draw(EXPERTS, HIDDEN, WIDTH, seed=4, grad=True),
    )
    out = expert_ffn(*leaves, torch.tensor(counts), recompute)
    slow = slow_experts(*leaves, counts)
    assert out.shape == (total, HIDDEN)
    torch.testing.assert_close(out, slow, rtol=1e-12, atol=1e-13)
    pull = draw(total, HIDDEN, seed=5)
    got = torch.autograd.grad(out, leaves, pull)
    wanted = torch.autograd.grad(slow, leaves, pull, allow_unused=True)
    for leaf, mine, other in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(
            mine, torch.zeros_like(leaf) if other is None else other, rtol=1e-11, atol=1e-12
        )


def test_an_expert_without_rows_gets_a_gradient_of_zeros_whatever_memory_held() -> None:
    experts = Experts(2, HIDDEN, WIDTH, dtype=F64)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(draw(*parameter.shape))
    rows = draw(3, HIDDEN, grad=True)
    experts(rows, draw(3, seed=1), torch.tensor([0, 3])).sum().backward()
    for grad in (experts.gate_up.grad, experts.down.grad):
        assert grad is not None and not grad[0].any() and grad[1].any()


def test_routed_parameters_are_marked_as_experts_and_shared_ones_are_not() -> None:
    moe = MoE(small_config(), RecomputeConfig(), 8, 0)
    marked = {name for name, parameter in moe.named_parameters() if getattr(parameter, "is_expert", False)}
    assert marked == {"experts.gate_up", "experts.down"}


def assert_near(got: Tensor, exact: Tensor, error: float) -> None:
    assert float(((got.detach().to(F64) - exact).norm() / exact.norm()).detach()) < error


@pytest.mark.parametrize("recompute", [False, True])
def test_experts_and_ffn_in_bf16_stay_within_roundings_of_fp64(recompute: bool) -> None:
    """Every value is rounded to 8 bits at a handful of places: an error near 2^-8, not of order one."""
    counts, kind = [40, 0, 9, 15], torch.bfloat16
    rough = [draw(64, HIDDEN, seed=1, dtype=kind), draw(64, seed=2, dtype=kind)]
    rough += [
        draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=3, dtype=kind),
        draw(EXPERTS, HIDDEN, WIDTH, seed=4, dtype=kind),
    ]
    rough = [leaf.requires_grad_() for leaf in rough]
    exact = [leaf.detach().to(F64).requires_grad_() for leaf in rough]
    pull = draw(64, HIDDEN, seed=5, dtype=kind)
    got = expert_ffn(rough[0], rough[1], rough[2], rough[3], torch.tensor(counts), recompute)
    wanted = slow_experts(exact[0], exact[1], exact[2], exact[3], counts)
    assert_near(got, wanted, 1e-2)
    grads = torch.autograd.grad(got, rough, pull), torch.autograd.grad(wanted, exact, pull.to(F64))
    for mine, other in zip(*grads, strict=True):
        assert mine.dtype == kind
        assert_near(mine, other, 1e-2)
    ffn = SwiGLU(HIDDEN, WIDTH, recompute, dtype=kind)
    with torch.no_grad():
        ffn.gate_up.weight.copy_(rough[2][0])
        ffn.down.weight.copy_(rough[3][0])
    out = ffn(rough[0])
    slow = torch.stack([oracle.swiglu(x, exact[2][0], exact[3][0]) for x in exact[0]])
    assert_near(out, slow, 1e-2)
    assert_near(
        torch.autograd.grad(out, rough[0], pull)[0],
        torch.autograd.grad(slow, exact[0], pull.to(F64))[0],
        1e-2,
    )


@pytest.mark.parametrize("recompute", [False, True])
def test_the_dense_ffn_equals_the_loop_over_tokens(recompute: bool) -> None:
    ffn = SwiGLU(HIDDEN, WIDTH, recompute, dtype=F64)
    with torch.no_grad():
        for number, parameter in enumerate(ffn.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=number))
    x = draw(2, 3, HIDDEN, seed=7, grad=True)
    leaves = [x, ffn.gate_up.weight, ffn.down.weight]
    slow = torch.stack([oracle.swiglu(t, *leaves[1:]) for t in x.flatten(0, 1)]).view_as(x)
    out, pull = ffn(x), draw(2, 3, HIDDEN, seed=8)
    torch.testing.assert_close(out, slow, rtol=1e-12, atol=1e-13)
    for mine, other in zip(*(torch.autograd.grad(y, leaves, pull) for y in (out, slow)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_swiglu_passes_gradcheck() -> None:
    assert torch.autograd.gradcheck(swiglu, (draw(3, 8, grad=True),))


@pytest.mark.parametrize("changes", [{}, {"num_groups": 1, "num_groups_kept": 1, "num_shared_experts": 1}])
def test_a_moe_layer_through_the_local_dispatcher_equals_the_loop_over_tokens(
    changes: dict[str, int],
) -> None:
    config = small_config(**changes)
    moe = MoE(config, RecomputeConfig(), config.num_experts, 0, dtype=F64)
    with torch.no_grad():
        for number, tensor in enumerate(moe.state_dict(keep_vars=True).values()):
            tensor.copy_(draw(*tensor.shape, seed=number) * 0.5)
    weights = {name: t.detach().clone().to(F64) for name, t in moe.state_dict().items()}
    for name, _ in moe.named_parameters():
        weights[name].requires_grad_()
    x, dispatcher = draw(1, 11, config.hidden_size, seed=20), LocalDispatcher(config.num_experts)
    gates, ids, balance = moe.router(x)
    received = differentiable.dispatch(dispatcher, x[0], gates, ids)
    routed = moe.experts(received.rows, received.row_weights, received.row_counts)
    assert moe.shared is not None
    out = differentiable.combine(dispatcher, routed, received.handle) + moe.shared(x)[0]
    slow, slow_balance, counts = oracle.moe(x[0], weights, config)
    torch.testing.assert_close(out, slow, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(balance, slow_balance, rtol=1e-12, atol=0)
    assert received.row_counts.tolist() == counts
    pull = draw(11, config.hidden_size, seed=21)
    out.backward(pull)
    slow.backward(pull)
    for name, parameter in moe.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("counts", [[3, 2, 4, 1], [0, 5, 0, 2], [0, 0, 9, 0]])
def test_grouped_products_equal_the_loop_of_products(counts: list[int]) -> None:
    """The way of CUDA, here in FP32 on the CPU, whose grouped product takes it too."""
    total, hidden, width = sum(counts), 8, 4  # grouped products want rows of whole 16 bytes
    leaves = (
        draw(total, hidden, seed=1, dtype=torch.float32, grad=True),
        draw(total, seed=2, dtype=torch.float32, grad=True),
        draw(EXPERTS, 2 * width, hidden, seed=3, dtype=torch.float32, grad=True),
        draw(EXPERTS, hidden, width, seed=4, dtype=torch.float32, grad=True),
    )
    pull = draw(total, hidden, seed=5, dtype=torch.float32)
    outs = [expert_ffn(*leaves, torch.tensor(counts), grouped=grouped) for grouped in (True, False)]
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)
    for mine, other in zip(*(torch.autograd.grad(out, leaves, pull) for out in outs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
