"""Weights of a model, counted from its widths: nothing is allocated and torch is not imported."""

from collections.abc import Mapping
from dataclasses import dataclass

from moe_runtime.config.schema import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """How many weights a model has. The routing bias is a buffer and not counted.

    Args:
        total: all weights of the main model, embedding and untied head included, MTP not.
        active: weights that one token is multiplied with in the main model: `total` without the
            experts it is not sent to and without the embedding table, of which it reads one row.
            This gives 36.6B for DeepSeek-V3, the report's "37B"; `active_with_embedding`, 37.6B,
            counts the table in full.
        mtp: weights of the MTP modules of their own (embedding and head are shared).
        mtp_active: those of them that one token is multiplied with, without the shared head.
        parts: weights of the main model by kind; the values sum to `total`.
    """

    total: int
    active: int
    mtp: int
    mtp_active: int
    parts: Mapping[str, int]

    @property
    def active_with_embedding(self) -> int:
        """`active` plus the whole embedding table."""
        return self.active + self.parts["embedding"]


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Counts the weights of a model.

    Returns:
        Totals and parts; 671.03B total for the published DeepSeek-V3 widths.

    Ref: DSV3 §4.2.
    """
    num_moe = model.num_layers - model.num_dense_layers
    table = model.vocab_size * model.hidden_size
    expert = expert_weights(model)
    parts = {
        "embedding": table,
        "head": table,
        "attention": model.num_layers * attention_weights(model),
        "dense_ffn": model.num_dense_layers * 3 * model.hidden_size * model.ffn_size,
        "routed_experts": num_moe * model.num_experts * expert,
        "shared_experts": num_moe * model.num_shared_experts * expert,
        "router": num_moe * model.num_experts * model.hidden_size,
        "norms": (2 * model.num_layers + 1) * model.hidden_size,
    }
    total = sum(parts.values())
    idle = (model.num_experts - model.top_k) * expert
    module = block_load(model, is_dense=False) + mtp_glue(model)
    return ParameterCounts(
        total=total,
        active=total - num_moe * idle - table,
        mtp=model.mtp_depth * (module + idle),
        mtp_active=model.mtp_depth * module,
        parts=parts,
    )


def expert_weights(model: ModelConfig) -> int:
    """Weights of one routed expert: gate, up and down."""
    return 3 * model.hidden_size * model.expert_ffn_size


def attention_weights(model: ModelConfig) -> int:
    """Weights of one layer's attention, latent norms included. Ref: DSV3 (1)-(11)."""
    hidden, heads = model.hidden_size, model.num_heads
    qk_dim = model.qk_nope_head_dim + model.qk_rope_head_dim
    out = heads * model.v_head_dim * hidden
    if model.attention == "mha":
        return hidden * heads * (2 * qk_dim + model.v_head_dim) + out
    if model.q_lora_rank is None:
        query = hidden * heads * qk_dim
    else:
        query = model.q_lora_rank * (hidden + 1 + heads * qk_dim)
    down = hidden * (model.kv_lora_rank + model.qk_rope_head_dim) + model.kv_lora_rank
    up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + down + up + out


def cache_width(model: ModelConfig) -> int:
    """Numbers that one token leaves in one layer for the tokens after it. Ref: DSV3 §2.1.1.

    Returns:
        mla: the latent and one rotary key; mha: key and value of every head.
    """
    if model.attention == "mha":
        return model.num_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim)
    return model.kv_lora_rank + model.qk_rope_head_dim


def cache_elements(model: ModelConfig, drafts: bool = True) -> int:
    """Numbers that one token leaves in all layers; `drafts`: in those of MTP modules too."""
    return (model.num_layers + (model.mtp_depth if drafts else 0)) * cache_width(model)


def block_load(model: ModelConfig, is_dense: bool) -> int:
    """Weights of one block that one token is multiplied with, its two norms included."""
    attention = attention_weights(model) + 2 * model.hidden_size
    if is_dense:
        return attention + 3 * model.hidden_size * model.ffn_size
    experts = (model.top_k + model.num_shared_experts) * expert_weights(model)
    return attention + experts + model.num_experts * model.hidden_size


def mtp_glue(model: ModelConfig) -> int:
    """Weights of one MTP module besides its block: projection and three norms. Ref: DSV3 (21)."""
    return 2 * model.hidden_size**2 + 3 * model.hidden_size


def stage_loads(model: ModelConfig) -> tuple[list[int], int, int]:
    """What a token meets on its way, in weights it is multiplied with: a stand-in for time.

    Returns:
        The load of each layer, what the first stage bears besides its layers (one row of the
        embedding) and what the last does (final norm, head, and MTP with the head once a depth).
    """
    layers = [block_load(model, is_dense=i < model.num_dense_layers) for i in range(model.num_layers)]
    head = model.vocab_size * model.hidden_size
    module = block_load(model, is_dense=False) + mtp_glue(model) + head
    return layers, model.hidden_size, model.hidden_size + head + model.mtp_depth * module


def moe_layers(model: ModelConfig) -> list[str]:
    """Canonical prefixes of every MoE layer, in the order in which they run, those of MTP last."""
    main = [f"layers.{layer}" for layer in range(model.num_dense_layers, model.num_layers)]
    return main + [f"mtp.{depth}.block" for depth in range(model.mtp_depth)]
