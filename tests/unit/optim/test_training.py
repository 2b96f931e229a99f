"""A small regression trains alike with moments of any storage; a known bad storage fails the same gate."""

import pytest
import torch
from moe_comm.wire.formats import Float8Format, encode_nearest

from moe_runtime.config.schema import RecipeConfig
from moe_runtime.optim import moments as moments_module
from moe_runtime.optim.adamw import AdamW
from moe_runtime.optim.schedule import lr_at
from moe_runtime.optim.step_path import ENVIRONMENT

STEPS, BATCH = 300, 64


def final_loss(moments: str, beta2: float, seed: int) -> float:
    """Mean squared error of a two-layer network fitted to another one, after a cosine of the rate."""
    generator = torch.Generator().manual_seed(seed)
    teacher = [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in ((48, 16), (8, 48))]
    # Columns of input of very unequal size give gradients of very unequal size within a block.
    sizes = torch.exp(1.5 * torch.randn(16, generator=generator))
    student = [torch.nn.Parameter(0.3 * torch.randn(w.shape, generator=generator)) for w in teacher]
    optimizer = AdamW(student, betas=(0.9, beta2), weight_decay=0.0, moments=moments, seed=seed)
    recipe = RecipeConfig(warmup_steps=10, constant_until_tokens=150, cosine_tokens=150, min_lr_ratio=0.01)
    losses = []
    for step in range(STEPS):
        inputs = torch.randn(BATCH, 16, generator=generator)
        wanted = torch.tanh(inputs @ teacher[0].T) @ teacher[1].T
        found = torch.tanh((inputs * sizes) @ (student[0] / sizes).T) @ student[1].T
        loss = (found - wanted).square().mean()
        for weight, grad in zip(student, torch.autograd.grad(loss, student), strict=True):
            weight.grad = grad
        for group in optimizer.param_groups:
            group["lr"] = lr_at(recipe, 0.02, step, step)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


def mean_ratio(moments: str, beta2: float, seeds: range) -> float:
    """Final loss with these moments over that with FP32 moments, averaged over seeds."""
    ratios = [final_loss(moments, beta2, seed) / final_loss("fp32", beta2, seed) for seed in seeds]
    return sum(ratios) / len(ratios)


# Over ten seeds, FP8 was 0.995 with a deviation of 0.05 a seed at beta2 0.95, 1.003 with 0.013 at 0.999;
# BF16 was 1.000 with 0.003, and 1.010 with 0.002.
def test_a_regression_ends_at_the_same_loss_in_fp32_bf16_and_fp8() -> None:
    assert mean_ratio("bf16", 0.95, range(1)) == pytest.approx(1, abs=0.01)
    assert mean_ratio("fp8", 0.95, range(2)) == pytest.approx(1, abs=0.08)


@pytest.mark.slow
@pytest.mark.parametrize("beta2", [0.95, 0.999])
def test_a_regression_ends_at_the_same_loss_over_ten_seeds(beta2: float) -> None:
    assert mean_ratio("bf16", beta2, range(10)) == pytest.approx(1, abs=0.015)
    assert mean_ratio("fp8", beta2, range(10)) == pytest.approx(1, abs=0.04)


def test_the_same_regression_fails_when_fp8_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_nearest(values: torch.Tensor, fmt: Float8Format, noise: torch.Tensor) -> torch.Tensor:
        return encode_nearest(values, fmt)

    monkeypatch.setenv(ENVIRONMENT, "eager")  # the fused step rounds for itself
    monkeypatch.setattr(moments_module, "encode_stochastic", to_nearest)
    assert mean_ratio("fp8", 0.95, range(1)) > 1.5  # 2.8 over ten seeds: v never falls with the gradients
