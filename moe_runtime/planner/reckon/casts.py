"""FP8 forms: how many bytes a cast takes, and which modules of a rank are cast.

    tiles     activations, 1 x 128: a byte a value and an FP32 scale for each 128 of a row
    blocks    weights, 128 x 128, both ways round: two bytes a value and two scales a block
    E5M6      the input of the linear after attention: twelve bits a value, and a scale as above

Ref: DSV3 §3.3.2, §3.3.3
"""

from collections.abc import Iterator
from math import prod

from moe_runtime.config.layout import ResolvedLayout
from moe_runtime.config.schema import ModelConfig, RunConfig
from moe_runtime.planner.reckon.parts import stages_of

TILE, SCALE = 128, 4


def tiles(width: int) -> float:
    """Bytes of a row of `width` values."""
    return width + SCALE * _parts(width)


def columns(width: int) -> float:
    """Bytes of a row whose tiles run along the rows, with rows a multiple of 128."""
    return width * (1 + SCALE / TILE)


def packed(width: int) -> float:
    """Bytes of a row of `width` values in E5M6."""
    return -(-3 * width // 2) + SCALE * _parts(width)


def blocks(*shape: int) -> float:
    """Bytes of a weight [..., out, in], or of so many of them, and of its transposed."""
    *many, out, inner = shape
    return 2.0 * prod(many) * (out * inner + SCALE * _parts(out) * _parts(inner))


def cast_bytes(config: RunConfig, layout: ResolvedLayout, rank: int) -> float:
    """Casts of a pipeline rank's weights that are kept within a step."""
    if config.precision != "fp8":
        return 0.0
    layers = [number for stage in stages_of(layout, rank) for number in layout.layers[stage]]
    names = [(f"layers.{n}", n >= config.model.num_dense_layers) for n in layers]
    if layout.num_stages - 1 in stages_of(layout, rank):
        names += [(f"mtp.{depth}.block", True) for depth in range(config.model.mtp_depth)]
    return sum(
        blocks(*shape)
        for name, is_moe in names
        for part, shape in cast_weights(config.model, is_moe, layout.ep)
        if config.fp8.multiplies(f"{name}.{part}")
    )


def cast_weights(model: ModelConfig, is_moe: bool, ep: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Each weight of a block that can be in FP8: the module's name, and its shape."""
    hidden, heads, kv = model.hidden_size, model.num_heads, model.kv_lora_rank
    qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    if model.q_lora_rank is None:
        yield "attn.q", (heads * qk, hidden)
    else:
        yield "attn.q_a", (model.q_lora_rank, hidden)
        yield "attn.q_b", (heads * qk, model.q_lora_rank)
    yield "attn.kv_a", (kv + model.qk_rope_head_dim, hidden)
    yield "attn.kv_b", (heads * (model.qk_nope_head_dim + v), kv)
    yield "attn.o", (hidden, heads * v)
    if not is_moe:
        yield from _gated("ffn", hidden, model.ffn_size)
        return
    if model.num_shared_experts:
        yield from _gated("moe.shared", hidden, model.num_shared_experts * model.expert_ffn_size)
    yield from _gated("moe.experts", hidden, model.expert_ffn_size, model.num_experts // ep)


def _gated(name: str, hidden: int, width: int, many: int = 1) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, (many, 2 * width, hidden)
    yield name, (many, hidden, width)


def _parts(width: int) -> int:
    return -(-width // TILE)
