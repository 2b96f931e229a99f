"""Logits equal those of transformers' DeepSeek-V3 with the same weights."""

from typing import Any

import pytest
import torch

from moe_runtime.cli.bench_train import copy_weights, open_peer
from moe_runtime.config.schema import YarnConfig
from tests.unit.model.samples import draw_tokens, small_config, small_model

pytest.importorskip("transformers")

CASES: dict[str, dict[str, Any]] = {
    "groups and query latent": {},
    "one group, full queries": {"q_lora_rank": None, "num_groups": 1, "num_groups_kept": 1},
    "YaRN": {"yarn": YarnConfig(factor=40.0, original_seq_len=64)},
}


def peer_of(config: Any) -> torch.nn.Module:
    peer = open_peer(config, torch.float32)
    if config.yarn is None:
        return peer
    settings: Any = peer.config
    settings.max_position_embeddings = int(config.yarn.factor * config.yarn.original_seq_len)
    settings.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": config.rope_theta,
        "factor": config.yarn.factor,
        "original_max_position_embeddings": config.yarn.original_seq_len,
        "beta_fast": config.yarn.beta_fast,
        "beta_slow": config.yarn.beta_slow,
        "mscale": config.yarn.mscale,
        "mscale_all_dim": config.yarn.mscale,
    }
    return type(peer)(settings)


@pytest.mark.parametrize("case", CASES)
def test_fp32_logits_equal_those_of_transformers(case: str) -> None:
    config = small_config(
        mtp_depth=0,
        hidden_size=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=16,
        v_head_dim=12,
        expert_ffn_size=8,
        **CASES[case],
    )
    model = small_model(config, dtype=torch.float32)
    for _, moe in model.moe_layers():
        # The peer masks dropped groups with 0 in some releases, which is right for positive scores only.
        moe.router.bias.abs_()
    peer = peer_of(config)
    copy_weights(model, peer)
    tokens = draw_tokens(config, 3, 40)
    with torch.no_grad():
        ours, theirs = model(tokens), peer(input_ids=tokens).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
