"""Latent attention, and the plain kind, against loops over heads, queries and keys."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.model.mha import MHA
from moe_runtime.model.mla import MLA, document_mask
from moe_runtime.model.rope import Rotary
from tests.unit.model.oracle import Weights, attention
from tests.unit.model.samples import F64, draw, small_config

SEPARATOR = 7


def small_attention(config: ModelConfig) -> MLA | MHA:
    rotary = Rotary(config.qk_rope_head_dim, config.rope_theta, config.yarn)
    if config.attention == "mha":
        mla: MLA | MHA = MHA(config, rotary, dtype=F64)
    else:
        mla = MLA(config, rotary, RecomputeConfig(), dtype=F64)
    with torch.no_grad():
        for number, parameter in enumerate(mla.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=100 + number) * 0.5)
    return mla


def slow_attention(
    config: ModelConfig, mla: MLA | MHA, x: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Weights]:
    weights = {name: p.detach().clone().requires_grad_() for name, p in mla.named_parameters()}
    words = [None] * x.shape[0] if tokens is None else tokens.tolist()
    separator = None if tokens is None else SEPARATOR
    rows = [attention(seq, weights, config, w, separator) for seq, w in zip(x, words, strict=True)]
    return torch.stack(rows), weights


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"v_head_dim": 13}, {"num_heads": 1}])
@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_output_and_gradients_equal_the_loop_over_heads(
    attention: str, changes: dict[str, Any], masked: bool
) -> None:
    config = small_config(attention=attention, **changes)
    mla = small_attention(config)
    x, pull = draw(2, 7, 24, grad=True), draw(2, 7, 24, seed=1)
    tokens = torch.tensor([[1, 2, 7, 3, 7, 7, 4], [7, 1, 1, 1, 1, 7, 1]]) if masked else None
    mask = None if tokens is None else document_mask(tokens, SEPARATOR)
    out = mla(x, mask)
    copy = x.detach().clone().requires_grad_()
    slow, weights = slow_attention(config, mla, copy, tokens)
    torch.testing.assert_close(out, slow, rtol=1e-10, atol=1e-11)
    out.backward(pull)
    slow.backward(pull)
    torch.testing.assert_close(x.grad, copy.grad, rtol=1e-10, atol=1e-11)
    for name, parameter in mla.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-10, atol=1e-11)


def test_a_sequence_of_one_token_attends_to_itself() -> None:
    config, x = small_config(), draw(3, 1, 24)
    mla = small_attention(config)
    torch.testing.assert_close(mla(x), slow_attention(config, mla, x, None)[0], rtol=1e-10, atol=1e-12)


def test_document_mask_ends_a_document_with_its_separator() -> None:
    tokens = torch.tensor([[1, 7, 2, 7, 7, 3], [1, 2, 3, 4, 5, 6], [7, 1, 2, 3, 4, 7]])
    mask = document_mask(tokens, SEPARATOR)
    assert mask.shape == (3, 1, 6, 6) and mask.dtype == torch.bool
    for row, words in enumerate(tokens.tolist()):
        for at in range(6):
            for to in range(6):
                wanted = to <= at and SEPARATOR not in words[to:at]
                assert bool(mask[row, 0, at, to]) == wanted, (row, at, to)


def test_without_separators_the_document_mask_is_causal_attention() -> None:
    mla, x = small_attention(small_config()), draw(2, 9, 24)
    mask = document_mask(torch.ones(2, 9, dtype=torch.int64), SEPARATOR)
    torch.testing.assert_close(mla(x, mask), mla(x), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("attention", ["mla", "mha"])
def test_bf16_stays_close_to_fp64(attention: str) -> None:
    exact = small_attention(small_config(attention=attention))
    rough = small_attention(small_config(attention=attention)).to(torch.bfloat16)
    x = draw(2, 33, 24, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted, got = exact(x.to(F64)), rough(x)
    assert got.dtype == torch.bfloat16
    assert float((got.to(F64) - wanted).norm() / wanted.norm()) < 0.02
