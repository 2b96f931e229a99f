"""Tiny models with weights wide enough that routing matters, as checkpoints and as transformers has them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.checkpoint.folder import Checkpoint, open_checkpoint
from moe_runtime.checkpoint.store import CheckpointStore, Contribution, Saved, SaveMeta
from moe_runtime.checkpoint.weights import weights_to_save
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.peers import Peers

BASE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_layers": 3, "num_dense_layers": 1, "ffn_size": 40,
    "num_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "num_experts": 8, "num_shared_experts": 1, "top_k": 2, "expert_ffn_size": 16,
    "num_groups": 4, "num_groups_kept": 2, "mtp_depth": 1, "init_std": 0.3,
}  # fmt: skip
YARN: dict[str, Any] = {"factor": 8.0, "original_seq_len": 16, "beta_fast": 2.0, "beta_slow": 1.0}


def run_config(model: ModelConfig, **changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "precision": "fp32",
        "model": model.model_dump(),
        "batch": {"seq_len": 64, "global_batch_size": 2},
        "data": {"path": "data"},
    }
    return RunConfig.model_validate(fields | changes)


def make_model(model: ModelConfig, seed: int = 5) -> Transformer:
    """A model whose routing biases are all negative, some by much, and whose norms are not all ones."""
    made = Transformer(model)
    made.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in made.state_dict().items():
            if name.endswith("router.bias"):
                tensor.copy_(-torch.rand(tensor.shape, generator=generator) - 0.5)
            elif name.endswith("norm.weight"):
                tensor.copy_(1.0 + 0.2 * torch.randn(tensor.shape, generator=generator))
    return made


def save(
    made: Transformer, folder: Path, extras: dict[str, bytes] | None = None, **changes: Any
) -> Checkpoint:
    """A checkpoint of the model."""
    config = run_config(made.config, **changes)
    meta = SaveMeta(tokens=0, config=config.model_dump(mode="json"), layout={"pp": 1, "dp": 1})
    weights = weights_to_save(made.state_dict(), 0, Peers())
    saved = CheckpointStore(folder, Peers(), 1).save(1, Contribution(weights, extras=extras or {}), meta)
    assert isinstance(saved, Saved), saved
    return open_checkpoint(saved.path)


def load_peer(folder: Path, num_layers: int) -> nn.Module:
    """transformers' model of a folder, in FP32, without remote code; every key fits, MTP's aside."""
    from transformers import AutoModelForCausalLM

    peer, said = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, trust_remote_code=False
    )
    assert not said["missing_keys"] and not said["mismatched_keys"], said
    extra = [name for name in said["unexpected_keys"] if int(name.split(".")[2]) < num_layers]
    assert not extra, extra
    return peer.eval()


def random_tokens(model: ModelConfig, sequences: int, length: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.vocab_size, (sequences, length), generator=generator)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, in parts of the range of the values."""
    return float((ours - theirs).abs().max() / (theirs.max() - theirs.min()))
