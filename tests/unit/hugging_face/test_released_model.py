"""The released DeepSeek-V3: its config.json, and the number of its weights."""

import math
from typing import Any

from moe_runtime.checkpoint.hugging_face.config_form import read_config, write_config
from moe_runtime.checkpoint.hugging_face.fp8_form import check_quantization
from moe_runtime.checkpoint.hugging_face.names import parameters_of
from moe_runtime.config.counts import count_parameters
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import ModelConfig

# Its keys and values; the order is ours.
RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0,
    "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129280,
}  # fmt: skip


def released() -> ModelConfig:
    """Our own model section of it, with the context extension of the released weights."""
    model = load_config("configs/run/v3_671b.yaml").model
    yarn = {"factor": 40.0, "original_seq_len": 4096}
    return ModelConfig.model_validate(model.model_dump() | {"yarn": yarn, "init_std": 0.02})


def test_the_released_config_is_our_model_section() -> None:
    said = read_config(RELEASED, "config.json")
    assert said.model == released()
    assert (said.dtype, said.context) == ("bf16", 163840)
    assert said.quantization is not None
    check_quantization(said.quantization, "config.json")


def test_what_we_write_of_it_agrees_with_what_was_released() -> None:
    written = write_config(
        released(),
        dtype="BF16",
        context=4096,
        balance_alpha=1e-4,
        text_ids={"bos_token_id": 0, "eos_token_id": 1},
    )
    differing = {key for key in RELEASED if written.get(key) != RELEASED[key]}
    assert differing == {"auto_map", "ep_size", "quantization_config", "transformers_version"}


def test_the_table_of_names_holds_the_weights_that_the_widths_give() -> None:
    model = released()
    table = [each for each in parameters_of(model) if not each.is_routing_bias]
    counts = count_parameters(model)
    mtp = sum(math.prod(each.shape) for each in table if each.name.startswith("mtp."))
    assert sum(math.prod(each.shape) for each in table) == counts.total + counts.mtp and mtp == counts.mtp
    copies = {name for each in table for name in each.copies}
    assert copies == {"model.layers.61.embed_tokens.weight", "model.layers.61.shared_head.head.weight"}
