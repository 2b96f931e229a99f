"""Small models and tensors for the tests of the model: every size differs, so that no mix-up fits."""

from typing import Any

import torch
from torch import Tensor

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.transformer import Transformer

F64 = torch.float64
SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_layers": 3,
    "num_dense_layers": 1,
    "ffn_size": 15,
    "num_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "num_experts": 8,
    "num_shared_experts": 2,
    "top_k": 3,
    "expert_ffn_size": 7,
    "num_groups": 4,
    "num_groups_kept": 2,
    "mtp_depth": 2,
    "init_std": 0.25,
}


def small_config(**changes: Any) -> ModelConfig:
    """The small model with some keys changed."""
    return ModelConfig(**{**SIZES, **changes})


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    """N(0, 1) in FP64, then cast."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=F64).to(dtype).requires_grad_(grad)


def draw_tokens(config: ModelConfig, sequences: int, length: int, seed: int = 0) -> Tensor:
    """int64 [sequences, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sequences, length), generator=generator)


@torch.no_grad()
def unsettle(model: torch.nn.Module, seed: int = 5) -> None:
    """Move norm gains off 1 and routing biases off 0, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.endswith("norm.weight"):
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.3)
        elif name.endswith("router.bias"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4 - 0.3)


def small_model(config: ModelConfig | None = None, **settings: Any) -> Transformer:
    """A filled and unsettled model, FP64 unless `dtype` says otherwise."""
    settings.setdefault("dtype", F64)
    model = Transformer(small_config() if config is None else config, **settings)
    model.init_weights(seed=3)
    unsettle(model)
    return model
