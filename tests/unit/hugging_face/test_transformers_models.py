"""Models that transformers made, and FP8 models as transformers reads them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.checkpoint.hugging_face.export import ExportOptions, export_model
from moe_runtime.checkpoint.hugging_face.importing import ImportOptions, import_model
from moe_runtime.checkpoint.load import load_model
from moe_runtime.config.schema import ModelConfig
from tests.unit.hugging_face.models import BASE, difference, load_peer, make_model, random_tokens, save

transformers = pytest.importorskip("transformers")

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 2.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def their_config(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 16, "n_group": 8,
        "topk_group": 4, "initializer_range": 0.3, "max_position_embeddings": 64,
    }  # fmt: skip
    return transformers.DeepseekV3Config(**(fields | changes))


@pytest.mark.parametrize(
    "changes", [{}, {"rope_parameters": YARN}, {"q_lora_rank": None, "first_k_dense_replace": 9}]
)
def test_a_model_that_transformers_made_is_imported(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = transformers.DeepseekV3ForCausalLM(their_config(**changes)).eval()
    for name, buffer in peer.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(-0.5 - torch.rand_like(buffer))
    peer.save_pretrained(tmp_path / "theirs")
    found = import_model(tmp_path / "theirs", tmp_path / "ours", ImportOptions())
    assert found.model.mtp_depth == 0 and len(found.warnings) == 1
    tokens = random_tokens(found.model, 2, 48)
    with torch.no_grad():
        assert difference(load_model(tmp_path / "ours")(tokens), peer(tokens).logits) <= 1e-4


def test_transformers_reads_our_fp8_form_with_our_logits(tmp_path: Path) -> None:
    """On the CPU it dequantises at loading; widths are such that its blocks are 128 x 128."""
    pytest.importorskip("accelerate", reason="transformers loads FP8 with accelerate only")
    widths = {"hidden_size": 128, "ffn_size": 256, "q_lora_rank": 128, "expert_ffn_size": 128}
    model = ModelConfig.model_validate(BASE | widths)
    export_model(save(make_model(model), tmp_path / "run"), tmp_path / "hub", ExportOptions(fp8=True))
    import_model(tmp_path / "hub", tmp_path / "ours", ImportOptions(dtype=torch.float32))
    tokens = random_tokens(model, 2, 48)
    with torch.no_grad():
        theirs = load_peer(tmp_path / "hub", model.num_layers)(tokens).logits
        assert difference(load_model(tmp_path / "ours")(tokens), theirs) <= 1e-4
