"""A model small enough to build in milliseconds, with every kind of parameter."""

import torch

from moe_runtime.config.schema import RunConfig
from moe_runtime.model.transformer import Transformer

CONFIG = RunConfig.model_validate(
    {
        "precision": "fp32",
        "model": {
            "vocab_size": 40, "hidden_size": 16, "num_layers": 3, "num_dense_layers": 1, "ffn_size": 24,
            "num_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4,
            "qk_rope_head_dim": 4, "v_head_dim": 4, "num_experts": 4, "top_k": 2, "expert_ffn_size": 8,
            "mtp_depth": 1, "init_std": 0.2,
        },
        "batch": {"seq_len": 8, "global_batch_size": 2},
        "data": {"path": "data"},
    }
)  # fmt: skip


def tiny_model(seed: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """The whole model with its weights, and routing biases that are not all alike."""
    model = Transformer(CONFIG.model, dtype=dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for _, moe in model.moe_layers():
        moe.router.bias.copy_(torch.randn(moe.router.bias.shape, generator=generator) / 10)
    return model
