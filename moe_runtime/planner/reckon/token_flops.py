"""Operations of a token by part, in both public conventions, and shares of the peak.

    causal     attention to earlier positions alone, as FlashAttention and DeepSeek count
    full       attention to all positions of the sequence, as Megatron counts
    with MTP   the modules' blocks, projections and second use of the head as well

Six operations a weight and token, forward and backward; what recompute makes again is not counted. A share of
a peak is that of BF16 or of FP8, always named: under FP8 training the first can pass what a GPU could do.
"""

from dataclasses import dataclass

from moe_runtime.config.counts import attention_weights, expert_weights, mtp_glue
from moe_runtime.config.schema import ModelConfig
from moe_runtime.planner.hardware.cluster import Peaks

CONVENTIONS = ("causal", "full", "causal_mtp", "full_mtp")
TERA = 1e12


@dataclass(frozen=True)
class TokenParts:
    """Training operations of one token, by part of the main model.

    Args:
        parts: {part: operations}; attention scores causal.
        mtp: of all MTP modules, causal.
        full_extra: what a full attention would add in the main model.
        full_extra_mtp: and in the modules.
    """

    parts: dict[str, float]
    mtp: float
    full_extra: float
    full_extra_mtp: float

    def total(self, convention: str) -> float:
        """Operations under one of CONVENTIONS."""
        total = sum(self.parts.values())
        is_full = convention.startswith("full")
        if convention.endswith("mtp"):
            total += self.mtp + (self.full_extra_mtp if is_full else 0.0)
        return total + (self.full_extra if is_full else 0.0)


def token_parts(model: ModelConfig, seq_len: int) -> TokenParts:
    """Operations of one token in sequences of `seq_len`. Ref: DSV3 §4.2."""
    hidden, layers, dense = model.hidden_size, model.num_layers, model.num_dense_layers
    moe, expert = layers - dense, expert_weights(model)
    latents = model.kv_lora_rank + (model.q_lora_rank or 0) if model.attention == "mla" else 0
    projections = attention_weights(model) - latents
    widths = model.qk_nope_head_dim + model.qk_rope_head_dim + model.v_head_dim
    score = 6 * model.num_heads * widths
    seen, unseen = (seq_len + 1) / 2, (seq_len - 1) / 2
    head = model.vocab_size * hidden
    routed, shared = model.top_k * expert, model.num_shared_experts * expert
    router = model.num_experts * hidden
    glue = mtp_glue(model) - 3 * hidden  # norms are no products
    module = 6 * (projections + routed + shared + router + glue + head) + score * seen
    parts = {
        "attention_projections": 6.0 * layers * projections,
        "attention_scores": layers * score * seen,
        "dense_ffn": 6.0 * dense * 3 * hidden * model.ffn_size,
        "router": 6.0 * moe * router,
        "routed_experts": 6.0 * moe * routed,
        "shared_experts": 6.0 * moe * shared,
        "head": 6.0 * head,
    }
    return TokenParts(
        parts, model.mtp_depth * module, layers * score * unseen, model.mtp_depth * score * unseen
    )


def model_flops_utilisation(
    parts: TokenParts, tokens_per_s: float, peaks: Peaks
) -> dict[str, dict[str, float]]:
    """{peak: {convention: share}} for a rate of one GPU."""
    rates = {"bf16_peak": peaks.bf16} | ({} if peaks.fp8 is None else {"fp8_peak": peaks.fp8})
    return {
        name: {one: parts.total(one) * tokens_per_s / (peak * TERA) for one in CONVENTIONS}
        for name, peak in rates.items()
    }
