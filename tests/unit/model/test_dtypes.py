"""A model of one dtype computes in it: FP64 never narrows, BF16 keeps in FP32 what must be."""

import pytest
import torch

from moe_runtime.config.schema import RecomputeConfig
from tests.unit.model.samples import F64, draw_tokens, small_config, small_model
from tests.unit.model.watch import Watch


@pytest.mark.parametrize("everything", [False, True], ids=["kept", "recomputed"])
def test_an_fp64_model_makes_no_tensor_of_a_lower_dtype(everything: bool) -> None:
    recompute = RecomputeConfig(norm=everything, swiglu=everything, mla_up=everything)
    model = small_model(recompute=recompute)
    tokens = draw_tokens(small_config(), 2, 9)
    with Watch() as watch:
        losses = model.losses(tokens)
        (losses.loss + losses.loss_mtp + losses.balance).backward()
    assert watch.dtypes == {F64, torch.complex128}
    assert losses.loss.dtype == losses.loss_mtp.dtype == losses.balance.dtype == F64


def test_an_fp32_model_makes_no_fp64_tensor_but_the_table_of_angles() -> None:
    model = small_model(dtype=torch.float32)
    tokens = draw_tokens(small_config(), 2, 9)
    model.losses(tokens)  # the table is made at first use
    with Watch() as watch:
        losses = model.losses(tokens)
        (losses.loss + losses.loss_mtp + losses.balance).backward()
    assert watch.dtypes == {torch.float32, torch.complex64}


def test_a_bf16_model_keeps_losses_in_fp32_and_gradients_in_its_own_dtype() -> None:
    model = small_model(dtype=torch.bfloat16)
    losses = model.losses(draw_tokens(small_config(), 2, 9))
    assert losses.loss.dtype == losses.loss_mtp.dtype == losses.balance.dtype == torch.float32
    (losses.loss + losses.loss_mtp + losses.balance).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.bfloat16}
    assert all(moe.router.bias.dtype == torch.float32 for _, moe in model.moe_layers())


def test_fp32_and_bf16_losses_are_near_those_of_fp64() -> None:
    tokens = draw_tokens(small_config(), 2, 17)
    exact = small_model(small_config(init_std=0.1)).losses(tokens)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        near = small_model(small_config(init_std=0.1), dtype=dtype).losses(tokens)
        assert near.loss.item() == pytest.approx(exact.loss.item(), rel=tolerance)
        assert near.loss_mtp.item() == pytest.approx(exact.loss_mtp.item(), rel=tolerance)
