"""Speed of the plain model: one training step of ours and of transformers', in turn.

Both have the same shapes, weights and tokens, and torch's AdamW with the same settings; in BF16 both
keep weights, gradients and moments in BF16. Ours also computes the balance loss and its gradient, which
the peer has not. Each round times one step of each, the order changing from round to round, and the
figure is the median over rounds of the ratio: what else the machine does hits both alike.

The floor is the matrix products and the attention of one step, alone, with the same shapes and forward
and backward, done as our model does them. Nothing that trains can be faster with these kernels.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_runtime.config.schema import ModelConfig
from moe_runtime.errors import ConfigError
from moe_runtime.model.product import wide
from moe_runtime.model.transformer import Transformer

SEQUENCES, SEQ_LEN = 8, 512
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BALANCE_ALPHA = 1e-4
MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_layers=6,
    num_dense_layers=1,
    ffn_size=768,
    num_heads=8,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    num_experts=32,
    num_shared_experts=1,
    top_k=4,
    expert_ffn_size=128,
    num_groups=4,
    num_groups_kept=2,
    mtp_depth=0,
    init_std=0.02,
)


def open_peer(config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> nn.Module:
    """transformers' model of the same shapes, with empty weights, at its default settings.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
    except ImportError as error:
        raise ConfigError(
            "bench: compares with transformers, which is not installed; pip install transformers"
        ) from error
    peer_config = DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        first_k_dense_replace=config.num_dense_layers,
        intermediate_size=config.ffn_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_heads,
        q_lora_rank=config.q_lora_rank,
        kv_lora_rank=config.kv_lora_rank,
        qk_nope_head_dim=config.qk_nope_head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        v_head_dim=config.v_head_dim,
        n_routed_experts=config.num_experts,
        n_shared_experts=config.num_shared_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_ffn_size,
        n_group=config.num_groups,
        topk_group=config.num_groups_kept,
        routed_scaling_factor=config.routed_scaling_factor,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        num_mtp_layers=0,
        use_cache=False,
    )
    with torch.device(device):
        peer: nn.Module = DeepseekV3ForCausalLM(peer_config)
    return peer.to(dtype)


def copy_weights(model: Transformer, peer: nn.Module) -> None:
    """Put our weights into the peer's parameters; every one of them is filled. It has no MTP modules."""
    state = model.state_dict()
    ours = {name: tensor.detach() for name, tensor in state.items() if not name.startswith("mtp.")}
    mapped: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        mapped.update(_peer_names(name, tensor))
    missing, unexpected = peer.load_state_dict(mapped, strict=False)
    assert not unexpected, f"no such parameters in the peer: {unexpected}"
    assert not missing, f"not filled in the peer: {missing}"


_TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_WITHIN = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.q.weight": "self_attn.q_proj.weight",
    "attn.q_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_a_norm.weight": "self_attn.q_a_layernorm.weight",
    "attn.q_b.weight": "self_attn.q_b_proj.weight",
    "attn.kv_a.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn.kv_a_norm.weight": "self_attn.kv_a_layernorm.weight",
    "attn.kv_b.weight": "self_attn.kv_b_proj.weight",
    "attn.o.weight": "self_attn.o_proj.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.router.bias": "mlp.gate.e_score_correction_bias",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
    "ffn.down.weight": "mlp.down_proj.weight",
    "moe.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}


def _peer_names(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The peer's name(s) of one of our tensors, with its part(s)."""
    if name in _TOP:
        return {_TOP[name]: tensor}
    if name == "head.weight":
        return {"lm_head.weight": tensor}
    _, layer, rest = name.split(".", 2)
    prefix = f"model.layers.{layer}."
    if rest.endswith("gate_up.weight"):
        owner = "mlp." if rest.startswith("ffn") else "mlp.shared_experts."
        gate, up = tensor.chunk(2)
        return {f"{prefix}{owner}gate_proj.weight": gate, f"{prefix}{owner}up_proj.weight": up}
    return {prefix + _WITHIN[rest]: tensor}


def our_step(model: Transformer, tokens: Tensor) -> Tensor:
    """Forward and backward of ours; gives the loss."""
    losses = model.losses(tokens)
    (losses.loss + BALANCE_ALPHA * losses.balance).backward()
    return losses.loss


def peer_step(peer: nn.Module, tokens: Tensor) -> Tensor:
    """Forward and backward of the peer; gives the loss."""
    targets = tokens[:, 1:].contiguous()
    loss = peer(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
    loss.backward()
    return loss


def _timed_step(step: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """(seconds, loss) of one whole step: forward, backward, AdamW."""
    start = time.perf_counter()
    loss = step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start, float(loss.detach())


def gemm_shapes(config: ModelConfig, tokens: int) -> list[tuple[int, int, int, int]]:
    """(how many, tokens, in, out) of every linear map in one forward; experts evenly loaded."""
    heads, hidden = config.num_heads, config.hidden_size
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    layers, dense = config.num_layers, config.num_dense_layers
    moe = layers - dense
    rank, shared = config.q_lora_rank, config.num_shared_experts * config.expert_ffn_size
    first = [(hidden, heads * width)] if rank is None else [(hidden, rank), (rank, heads * width)]
    attention = [
        *first,
        (hidden, config.kv_lora_rank + config.qk_rope_head_dim),
        (config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim)),
        (heads * config.v_head_dim, hidden),
    ]
    rows = tokens * config.top_k // config.num_experts
    experts, inner = moe * config.num_experts, config.expert_ffn_size
    return [
        *((layers, tokens, *shape) for shape in attention),
        (dense, tokens, hidden, 2 * config.ffn_size),
        (dense, tokens, config.ffn_size, hidden),
        (moe, tokens, hidden, config.num_experts),
        (moe, tokens, hidden, 2 * shared),
        (moe, tokens, shared, hidden),
        (experts, rows, hidden, 2 * inner),
        (experts, rows, inner, hidden),
        (1, tokens, hidden, config.vocab_size),
    ]


def floor_of(config: ModelConfig, dtype: torch.dtype) -> Callable[[], None]:
    """A function that does one step's products and attention, forward and backward, and nothing else."""
    tokens = SEQUENCES * SEQ_LEN
    products = []
    for times, rows, fan_in, fan_out in gemm_shapes(config, tokens):
        x, w, d = (
            wide(torch.randn(s, dtype=dtype)) for s in ((rows, fan_in), (fan_out, fan_in), (rows, fan_out))
        )
        products.append((times, x, w, d))
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    shape = (SEQUENCES, SEQ_LEN, config.num_heads, width)
    query, key, value, pull = (wide(torch.randn(shape, dtype=dtype)).transpose(1, 2) for _ in range(4))
    leaves = [leaf.requires_grad_() for leaf in (query, key, value)]

    def run() -> None:
        for times, x, w, d in products:
            for _ in range(times):
                torch.mm(x, w.t()), torch.mm(d, w), torch.mm(d.t(), x)
        for _ in range(config.num_layers):
            out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            torch.autograd.grad(out, leaves, pull)

    return run


def measure(precision: str, rounds: int, threads: int) -> dict[str, Any]:
    """Time both models and the floor in one precision.

    Returns:
        tokens/s of each, the median ratio over rounds, and both losses of the first step.
    """
    torch.set_num_threads(threads)
    dtype = DTYPES[precision]
    model = Transformer(MODEL, dtype=dtype)
    model.init_weights(seed=1)
    peer = open_peer(MODEL, dtype)
    copy_weights(model, peer)
    draw = torch.Generator().manual_seed(2)
    tokens = torch.randint(MODEL.vocab_size, (SEQUENCES, SEQ_LEN + 1), generator=draw)
    ours = (lambda: our_step(model, tokens), torch.optim.AdamW(model.parameters(), lr=1e-4))
    theirs = (lambda: peer_step(peer, tokens), torch.optim.AdamW(peer.parameters(), lr=1e-4))
    floor = floor_of(MODEL, dtype)
    losses = [_timed_step(*ours)[1], _timed_step(*theirs)[1]]
    _timed_step(*ours), _timed_step(*theirs), floor()
    times: dict[str, list[float]] = {"ours": [], "peer": [], "floor": []}
    for turn in range(rounds):
        pair = (("ours", ours), ("peer", theirs))
        for name, side in pair if turn % 2 == 0 else reversed(pair):
            times[name].append(_timed_step(*side)[0])
        start = time.perf_counter()
        floor()
        times["floor"].append(time.perf_counter() - start)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(times["ours"], times["peer"], strict=True)]
    speed = {name: SEQUENCES * SEQ_LEN / statistics.median(seconds) for name, seconds in times.items()}
    return {
        "precision": precision,
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "tokens_per_s": speed,
        "loss": {"ours": losses[0], "peer": losses[1]},
        "rounds": rounds,
        "threads": threads,
    }


def describe(results: list[dict[str, Any]]) -> str:
    """The measurement as a table."""
    lines = [
        "training tokens/s of one process on the CPU, against transformers' DeepseekV3ForCausalLM",
        f"{'':6}{'ours':>9}{'peer':>9}{'floor':>9}{'ratio':>8}   {'(range)':15}loss ours / peer",
    ]
    for result in results:
        speed, loss = result["tokens_per_s"], result["loss"]
        span = f"({result['ratio_low']:.2f}-{result['ratio_high']:.2f})"
        lines.append(
            f"{result['precision']:6}{speed['ours']:9.0f}{speed['peer']:9.0f}{speed['floor']:9.0f}"
            f"{result['ratio']:7.2f}x   {span:15}{loss['ours']:.5f} / {loss['peer']:.5f}"
        )
    lines.append("floor: products and attention of one step alone, forward and backward")
    return "\n".join(lines)
