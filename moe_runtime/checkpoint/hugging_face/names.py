"""Our parameters and DeepSeek's, as data: every tensor of a model with its shape and its other name(s).

    layers.3.moe.experts.5.gate_up [2f, hidden]   model.layers.3.mlp.experts.5.gate_proj.weight [f, hidden]
                                                  model.layers.3.mlp.experts.5.up_proj.weight   [f, hidden]
    mtp.0.block.attn.o.weight                     model.layers.{L}.self_attn.o_proj.weight
    embed.weight                                  model.embed_tokens.weight, and once more in each MTP layer

Gate and up projections are one matrix here, gate rows first, and two matrices there; everything else keeps
its shape. The rotary rows need no permutation: both keep them as interleaved pairs. MTP depth k is layer
L + k, which repeats the shared embedding and head under its own names (`copies`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

from moe_runtime.config.schema import ModelConfig


@dataclass(frozen=True)
class Parameter:
    """One tensor of a checkpoint.

    Args:
        name: canonical name, one tensor for each expert.
        shape: of it.
        parts: Hugging Face names; the tensor is their rows, one part after the other, in equal shares.
        copies: other names under which the whole tensor is written again.
        is_linear: True for matrices that the FP8 form quantises.
        is_routing_bias: True for the router's FP32 bias.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    copies: tuple[str, ...] = ()
    is_linear: bool = False
    is_routing_bias: bool = False

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of each part."""
        return (self.shape[0] // len(self.parts), *self.shape[1:])


def parameters_of(model: ModelConfig) -> Iterator[Parameter]:
    """Every parameter and saved buffer of a model, in the order of its layers."""
    first_mtp, end = model.num_layers, model.num_layers + model.mtp_depth
    hidden, table = model.hidden_size, (model.vocab_size, model.hidden_size)
    mtp_layers = range(first_mtp, end)
    copies = tuple(f"model.layers.{layer}.embed_tokens.weight" for layer in mtp_layers)
    yield Parameter("embed.weight", table, ("model.embed_tokens.weight",), copies)
    for layer in range(model.num_layers):
        yield from _block(model, f"layers.{layer}.", f"model.layers.{layer}.", layer < model.num_dense_layers)
    yield Parameter("norm.weight", (hidden,), ("model.norm.weight",))
    copies = tuple(f"model.layers.{layer}.shared_head.head.weight" for layer in mtp_layers)
    yield Parameter("head.weight", table, ("lm_head.weight",), copies)
    for depth in range(model.mtp_depth):
        yield from mtp_parameters(model, depth)


def mtp_parameters(model: ModelConfig, depth: int) -> Iterator[Parameter]:
    """The parameters of one MTP depth, without the copies of embedding and head. Ref: DSV3 §2.2."""
    ours, theirs, hidden = f"mtp.{depth}.", f"model.layers.{model.num_layers + depth}.", model.hidden_size
    yield Parameter(f"{ours}enorm.weight", (hidden,), (f"{theirs}enorm.weight",))
    yield Parameter(f"{ours}hnorm.weight", (hidden,), (f"{theirs}hnorm.weight",))
    yield Parameter(f"{ours}eh_proj.weight", (hidden, 2 * hidden), (f"{theirs}eh_proj.weight",))
    yield from _block(model, f"{ours}block.", theirs, is_dense=False)
    yield Parameter(f"{ours}norm.weight", (hidden,), (f"{theirs}shared_head.norm.weight",))


def _block(model: ModelConfig, ours: str, theirs: str, is_dense: bool) -> Iterator[Parameter]:
    norm = (model.hidden_size,)
    yield Parameter(f"{ours}attn_norm.weight", norm, (f"{theirs}input_layernorm.weight",))
    yield from _attention(model, f"{ours}attn.", f"{theirs}self_attn.")
    yield Parameter(f"{ours}ffn_norm.weight", norm, (f"{theirs}post_attention_layernorm.weight",))
    if is_dense:
        yield from _swiglu(f"{ours}ffn.", f"{theirs}mlp.", model.hidden_size, model.ffn_size)
    else:
        yield from _moe(model, f"{ours}moe.", f"{theirs}mlp.")


def _attention(model: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """Ref: DSV3 (1)-(11)."""
    hidden, heads = model.hidden_size, model.num_heads
    query = heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
    latent, rank = model.kv_lora_rank, model.q_lora_rank
    if rank is None:
        yield _linear(f"{ours}q.weight", (query, hidden), f"{theirs}q_proj.weight")
    else:
        yield _linear(f"{ours}q_a.weight", (rank, hidden), f"{theirs}q_a_proj.weight")
        yield Parameter(f"{ours}q_a_norm.weight", (rank,), (f"{theirs}q_a_layernorm.weight",))
        yield _linear(f"{ours}q_b.weight", (query, rank), f"{theirs}q_b_proj.weight")
    down = (latent + model.qk_rope_head_dim, hidden)
    yield _linear(f"{ours}kv_a.weight", down, f"{theirs}kv_a_proj_with_mqa.weight")
    yield Parameter(f"{ours}kv_a_norm.weight", (latent,), (f"{theirs}kv_a_layernorm.weight",))
    up = (heads * (model.qk_nope_head_dim + model.v_head_dim), latent)
    yield _linear(f"{ours}kv_b.weight", up, f"{theirs}kv_b_proj.weight")
    yield _linear(f"{ours}o.weight", (hidden, heads * model.v_head_dim), f"{theirs}o_proj.weight")


def _moe(model: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """Ref: DSV3 (12)-(16)."""
    hidden, experts = model.hidden_size, model.num_experts
    yield Parameter(f"{ours}router.weight", (experts, hidden), (f"{theirs}gate.weight",))
    bias = (f"{theirs}gate.e_score_correction_bias",)
    yield Parameter(f"{ours}router.bias", (experts,), bias, is_routing_bias=True)
    for expert in range(experts):
        names = f"{ours}experts.{expert}.", f"{theirs}experts.{expert}."
        yield from _swiglu(*names, hidden, model.expert_ffn_size, suffix="")
    if model.num_shared_experts:
        width = model.num_shared_experts * model.expert_ffn_size
        yield from _swiglu(f"{ours}shared.", f"{theirs}shared_experts.", hidden, width)


def _swiglu(
    ours: str, theirs: str, hidden: int, width: int, suffix: str = ".weight"
) -> tuple[Parameter, Parameter]:
    halves = f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"
    return (
        Parameter(f"{ours}gate_up{suffix}", (2 * width, hidden), halves, is_linear=True),
        _linear(f"{ours}down{suffix}", (hidden, width), f"{theirs}down_proj.weight"),
    )


def _linear(name: str, shape: tuple[int, int], other: str) -> Parameter:
    return Parameter(name, shape, (other,), is_linear=True)


def empty_parts(model: ModelConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """What transformers expects of a model without shared experts: their matrices, with no rows in them."""
    if model.num_shared_experts:
        return
    hidden = model.hidden_size
    for layer in range(model.num_dense_layers, model.num_layers + model.mtp_depth):
        owner = f"model.layers.{layer}.mlp.shared_experts."
        yield f"{owner}gate_proj.weight", (0, hidden)
        yield f"{owner}up_proj.weight", (0, hidden)
        yield f"{owner}down_proj.weight", (hidden, 0)
