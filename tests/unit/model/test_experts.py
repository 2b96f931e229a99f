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

EXPERTS, HIDDEN, WIDTH = 4, 6, 5
COUNTS = [[3, 2, 4, 1], [0, 5, 0, 2], [0, 0, 9, 0], [7, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]


def slow_experts(rows: Tensor, row_weights: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
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
    leaves = [
        draw(total, HIDDEN, seed=1, grad=True),
        draw(total, seed=2, grad=True),
        draw(EXPERTS, 2 * WIDTH, HIDDEN, seed=3, grad=True),
        draw(EXPERTS, HIDDEN, WIDTH, seed=4, grad=True),
    ]
    out = expert_ffn(*leaves, torch.tensor(counts), recompute)
    slow = slow_experts(*leaves, counts)
    assert out.shape == (total, HIDDEN)
    torch.testing.assert_close(out, slow, rtol=1e-12, atol=1e-13)
    pull = draw(total, HIDDEN, seed=5)
    got = torch.autograd.grad(out, leaves, pull)
    wanted = torch.autograd.grad(slow, leaves, pull, allow_unused=True)
    for leaf, mine, other in zip(leaves, got, wanted, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(leaf) if other is None else other, rtol=1e-11, atol=1e-12)


def test_an_expert_without_rows_gets_a_gradient_of_zeros_over_whatever_memory_held() -> None:
    experts = Experts(2, HIDDEN, WIDTH, dtype=F64)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(draw(*parameter.shape))
    rows = draw(3, HIDDEN, grad=True)
    experts(rows, draw(3, seed=1), torch.tensor([0, 3])).sum().backward()
    assert not experts.gate_up.grad[0].any() and not experts.down.grad[0].any()
    assert experts.gate_up.grad[1].any() and experts.down.grad[1].any()


def test_routed_parameters_are_marked_as_experts_and_shared_ones_are_not() -> None:
    moe = MoE(small_config(), RecomputeConfig(), 8, 0)
    marked = {name for name, parameter in moe.named_parameters() if getattr(parameter, "is_expert", False)}
    assert marked == {"experts.gate_up", "experts.down"}


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
