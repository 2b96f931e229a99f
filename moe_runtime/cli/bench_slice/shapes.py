"""The slice of DeepSeek-V3 that is trained, what one step of it multiplies, and how much of it fits.

True widths, one dense and two MoE layers, as many experts as fit; no MTP. A step's operations are
those of its products and of the attention core, three times those of the forward; what is recomputed,
routing, norms and the optimizer do not count. The attention core counts in two ways: `full`, as if every
position looked at all others, and `causal`, half of that, which is what is needed.

Ref: DSV3 §4.2, §3.2.3
"""

from dataclasses import dataclass
from typing import Literal

from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import ConfigError

Convention = Literal["causal", "full"]
GIB = 2**30
# A BF16 weight, its FP32 master, an FP32 gradient, FP8 moments, and its E4M3 casts both ways.
PARAM_BYTES = 2 + 4 + 4 + 2.02 + 2
# What is held for one token between forward and backward, and at the fullest moment of the backward, in BF16.
TOKEN_BYTES = 2.3e6
RESERVE = 8 * GIB  # library workspaces, fragments, the widest temporary of a weight gradient
EXPERT_STEP = 8


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one training step, forward and backward.

    Args:
        fp8: of products that are FP8 under the policy's table.
        high: of the others.
        core: of attention's core, counted in full.
    """

    fp8: float
    high: float
    core: float

    def total(self, convention: Convention) -> float:
        """All of them."""
        return self.fp8 + self.high + self._core(convention)

    def seconds(self, convention: Convention, bf16_peak: float, fp8_peak: float | None = None) -> float:
        """How long they take at these rates, 1/s; without `fp8_peak` all run at that of BF16."""
        fast = self.fp8 / (fp8_peak or bf16_peak)
        return fast + (self.high + self._core(convention)) / bf16_peak

    def _core(self, convention: Convention) -> float:
        return self.core / 2 if convention == "causal" else self.core


def slice_config(num_experts: int, vocab_size: int) -> ModelConfig:
    """The slice with that many routed experts a layer.

    Raises:
        ConfigError: not a multiple of 8, or fewer than 16.
    """
    if num_experts % EXPERT_STEP or num_experts < 2 * EXPERT_STEP:
        raise ConfigError(
            f"bench train: expected experts in eights, at least {2 * EXPERT_STEP}, got {num_experts}"
        )
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=7168,
        num_layers=3,
        num_dense_layers=1,
        ffn_size=18432,
        num_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=num_experts,
        num_shared_experts=1,
        top_k=8,
        expert_ffn_size=2048,
        num_groups=8,
        num_groups_kept=4,
        mtp_depth=0,
    )


def count_parameters(config: ModelConfig) -> int:
    """Weights of all matrices; norms are left out."""
    hidden = config.hidden_size
    attention, dense, shared, expert = _layer_parts(config)
    moe_layers = config.num_layers - config.num_dense_layers
    routed = config.num_experts * expert + config.num_experts * hidden
    layers = config.num_layers * attention + config.num_dense_layers * dense
    return layers + moe_layers * (shared + routed) + 2 * config.vocab_size * hidden


def operations(config: ModelConfig, sequences: int, seq_len: int) -> Operations:
    """Of one step on sequences x seq_len tokens."""
    attention, dense, shared, expert = _layer_parts(config)
    hidden, moe_layers = config.hidden_size, config.num_layers - config.num_dense_layers
    width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    routed = config.top_k * expert
    fp8 = config.num_layers * attention + config.num_dense_layers * dense + moe_layers * (shared + routed)
    high = moe_layers * config.num_experts * hidden + config.vocab_size * hidden
    tokens = sequences * seq_len
    core = 2 * config.num_layers * config.num_heads * width * seq_len * tokens
    return Operations(6.0 * fp8 * tokens, 6.0 * high * tokens, 3.0 * core)


def experts_that_fit(free_bytes: int, vocab_size: int, tokens: int) -> int:
    """The largest number of experts whose training state and activations fit, in eights.

    Args:
        free_bytes: of device memory.
        tokens: of one microbatch.

    Raises:
        ConfigError: not even 16 fit.
    """
    room = free_bytes - RESERVE - TOKEN_BYTES * tokens
    fewest = 2 * EXPERT_STEP
    best = 0
    for experts in range(fewest, 257, EXPERT_STEP):
        if count_parameters(slice_config(experts, vocab_size)) * PARAM_BYTES <= room:
            best = experts
    if best == 0:
        raise ConfigError(
            f"bench train: expected memory for {fewest} experts and {tokens} tokens, got "
            f"{free_bytes / GIB:.0f} GiB; take fewer --sequences"
        )
    return best


def _layer_parts(config: ModelConfig) -> tuple[int, int, int, int]:
    """Weights of attention, of the dense FFN, of the shared experts and of one routed expert."""
    hidden, heads = config.hidden_size, config.num_heads
    query_width = config.qk_nope_head_dim + config.qk_rope_head_dim
    rank = config.q_lora_rank
    query = hidden * heads * query_width if rank is None else rank * (hidden + heads * query_width)
    latent = hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
    lifted = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    attention = query + latent + lifted + heads * config.v_head_dim * hidden
    expert = 3 * hidden * config.expert_ffn_size
    return attention, 3 * hidden * config.ffn_size, config.num_shared_experts * expert, expert
