"""The plain model equals the equations written out, losses and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.transformer import Losses, Transformer
from tests.unit.model.oracle import Sums, Weights, model_losses
from tests.unit.model.samples import F64, draw_tokens, small_config, small_model

CASES: dict[str, dict[str, Any]] = {
    "groups, q latent, two MTP depths": {},
    "full queries, one group, no shared experts, no MTP": {
        "q_lora_rank": None,
        "num_groups": 1,
        "num_groups_kept": 1,
        "num_shared_experts": 0,
        "mtp_depth": 0,
    },
    "values wider than keys, no dense layer": {"v_head_dim": 12, "num_dense_layers": 0, "mtp_depth": 1},
    "multi-head attention": {"attention": "mha", "num_layers": 2, "mtp_depth": 1},
}


def weights_of(model: Transformer) -> Weights:
    """Copies in FP64; those of parameters want gradients."""
    trained = {name for name, _ in model.named_parameters()}
    state = model.state_dict()
    return {name: state[name].clone().to(F64).requires_grad_(name in trained) for name in state}


def objective(losses: Losses | Sums) -> Tensor:
    return losses.loss + 0.3 * losses.loss_mtp + 0.7 * losses.balance


def assert_equal_to_oracle(config: ModelConfig, separator: int | None, seq_len: int = 6) -> None:
    model = small_model(config, document_separator=separator)
    weights = weights_of(model)
    tokens = draw_tokens(config, 2, seq_len + 1 + config.mtp_depth)
    if separator is not None:
        tokens[0, 2] = tokens[1, 0] = tokens[1, 4] = separator
    ours, slow = model.losses(tokens), model_losses(weights, config, tokens, separator)
    for name in ("loss", "loss_mtp", "balance"):
        # Without MTP its loss is a zero in FP32.
        torch.testing.assert_close(getattr(ours, name).to(F64), getattr(slow, name), rtol=1e-10, atol=0)
    assert ours.counts.tolist() == slow.counts
    objective(ours).backward()
    objective(slow).backward()
    for name, parameter in model.named_parameters():
        grad = weights[name].grad
        wanted = torch.zeros_like(parameter) if grad is None else grad
        got = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-11), name


@pytest.mark.parametrize("case", CASES)
def test_losses_counts_and_all_gradients_equal_the_equations(case: str) -> None:
    assert_equal_to_oracle(small_config(**CASES[case]), separator=None)


def test_documents_do_not_see_each_other_in_any_layer_nor_in_mtp() -> None:
    assert_equal_to_oracle(small_config(), separator=36)


def test_mtp_depths_predict_the_tokens_after_the_next_and_not_the_same_ones() -> None:
    """A change of the last token moves the last depth's loss alone."""
    config = small_config()
    model = small_model(config)
    tokens = draw_tokens(config, 1, 6 + 3)
    other = tokens.clone()
    other[0, -1] = (other[0, -1] + 1) % config.vocab_size
    first, second = model.losses(tokens), model.losses(other)
    assert torch.equal(first.loss, second.loss) and torch.equal(first.balance, second.balance)
    assert not torch.equal(first.loss_mtp, second.loss_mtp)


def test_logits_are_causal_and_the_loss_is_their_cross_entropy() -> None:
    config = small_config()
    model = small_model(config)
    tokens = draw_tokens(config, 2, 7 + 3)
    logits = model(tokens[:, :7])
    other = tokens[:, :7].clone()
    other[:, 5:] = (other[:, 5:] + 1) % config.vocab_size
    assert torch.equal(logits[:, :5], model(other)[:, :5])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:8].flatten())
    torch.testing.assert_close(model.losses(tokens).loss, loss, rtol=1e-12, atol=0)


def test_counts_are_rows_of_moe_layers_in_their_order_and_hold_every_choice() -> None:
    config = small_config()
    model = small_model(config)
    counts = model.losses(draw_tokens(config, 2, 9)).counts
    names = [name for name, _ in model.moe_layers()]
    assert names == ["layers.1", "layers.2", "mtp.0.block", "mtp.1.block"]
    assert counts.dtype == torch.int64 and counts.shape == (len(names), config.num_experts)
    assert counts.sum(dim=1).tolist() == [2 * 6 * config.top_k] * len(names)
