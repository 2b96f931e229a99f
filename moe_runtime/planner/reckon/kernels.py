"""The kernels of a block, from the widths of a model: what is multiplied, what is only moved.

One microbatch of one sequence length in one block, forward, backward for inputs and for weights, each as a
list of kernels with shapes. Nothing here knows how fast a machine is (`kernel_time.py`).

    attend     norm, q and kv down, latent norms, q and kv up, rotation, attention, o, residual, norm, router
    experts    rows in order, gate and up, SwiGLU, down, rows back in order
    shared     gate and up, SwiGLU, down of all tokens
    dense      gate and up, SwiGLU, down of a layer without experts

The backward for inputs of a product is a product of the same size with inner and outer width exchanged;
that for weights sums over the rows. A recomputed part is made again in the backward for inputs. Under FP8
every input of a product is cast, and for the backward once more along the other axis.

Ref: DSV3 (1)-(15), §3.2.3, §3.3; the kernels that DeepSeek's own trace shows between its products.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from moe_runtime.config.schema import ModelConfig, RecomputeConfig

BF16 = 2


@dataclass(frozen=True)
class Product:
    """[rows, inner] x [inner, outer], `groups` of them with `rows` in all.

    Args:
        weight: the sum is over rows: a weight gradient, written in FP32.
        fp8: multiplied in FP8 if the run is.
    """

    name: str
    rows: float
    inner: int
    outer: int
    groups: int = 1
    weight: bool = False
    fp8: bool = True

    @property
    def flops(self) -> float:
        """Operations, two for a multiplication and an addition."""
        return 2.0 * self.rows * self.inner * self.outer

    @property
    def sum_over(self) -> float:
        """Terms of the sum of one output."""
        return self.rows / self.groups if self.weight else self.inner


@dataclass(frozen=True)
class Attention:
    """Causal attention over sequences.

    Args:
        tokens: of the microbatch.
        seq_len: of a sequence.
        heads, qk, v: heads and their widths.
        backward: five products instead of two.
    """

    name: str
    tokens: int
    seq_len: int
    heads: int
    qk: int
    v: int
    backward: bool = False

    @property
    def flops(self) -> float:
        """Operations of the triangle that a causal model needs."""
        pairs = self.tokens * (self.seq_len + 1) / 2 * self.heads
        return 2.0 * pairs * ((3 * self.qk + 2 * self.v) if self.backward else (self.qk + self.v))


@dataclass(frozen=True)
class Move:
    """A kernel that is bound by memory: bytes read and written together."""

    name: str
    bytes: float


Kernel = Product | Attention | Move


@dataclass(frozen=True)
class Phases:
    """Kernels of one part of a block, by what they are for."""

    forward: tuple[Kernel, ...]
    input_grad: tuple[Kernel, ...]
    weight_grad: tuple[Kernel, ...]


@dataclass(frozen=True)
class Shape:
    """What a block is run on.

    Args:
        tokens: of a microbatch on one rank.
        seq_len: of its sequences.
        rows: (token, expert) pairs that one rank's experts get.
        local_experts: that one rank holds.
        fp8: products and what travels between them are FP8.
    """

    tokens: int
    seq_len: int
    rows: float
    local_experts: int
    fp8: bool


def attend(model: ModelConfig, shape: Shape, recompute: RecomputeConfig, router: bool) -> Phases:
    """From the stream to the stream and, in a MoE block, the choice of experts."""
    t, hidden, heads = shape.tokens, model.hidden_size, model.num_heads
    qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    downs, ups = _projections(model, t)
    out = Product("o", t, heads * v, hidden)
    core = Attention("attention", t, shape.seq_len, heads, qk, v)
    turned = Move("rotate and join heads", BF16 * t * heads * (2 * (qk + qk + v)))
    latents = sum(up.inner for up in ups)
    norms = [_norm("norm", t, hidden), _norm("latent norms", t, latents)]
    after = [Move("residual", BF16 * 3 * t * hidden), _norm("norm after", t, hidden)]
    route = [Product("router", t, hidden, model.num_experts, fp8=False)] if router else []
    casts = _casts(shape, [*downs[:1], *ups, out])
    forward: list[Kernel] = [norms[0], *casts, *downs, norms[1], *ups, turned, core, out, *after, *route]
    again: list[Kernel] = []
    if recompute.norm:
        again += norms
    if recompute.mla_up:
        again += [*ups, turned]
    backward: list[Kernel] = [
        *again,
        *map(of_input, (*route, out, *ups, *downs)),
        *_casts(shape, [of_input(one) for one in (out, *ups, *downs)]),
        Attention("attention backward", t, shape.seq_len, heads, qk, v, backward=True),
        turned,
        Move("norms backward", BF16 * t * (4 * 2 * hidden + 4 * latents)),
        Move("residual", BF16 * 3 * t * hidden),
    ]
    weights: list[Kernel] = [
        *map(of_weight, (*route, out, *ups, *downs)),
        *_column_casts(shape, [out, *ups, *downs[:1]]),
    ]
    return Phases(tuple(forward), tuple(backward), tuple(weights))


def _projections(model: ModelConfig, tokens: int) -> tuple[list[Product], list[Product]]:
    """Products from the stream down, and from latents up."""
    hidden, heads = model.hidden_size, model.num_heads
    qk, v = model.qk_nope_head_dim + model.qk_rope_head_dim, model.v_head_dim
    if model.attention == "mha":
        return [Product("q, k, v", tokens, hidden, heads * (2 * qk + v))], []
    kv_down = model.kv_lora_rank + model.qk_rope_head_dim
    kv_up = Product("kv up", tokens, model.kv_lora_rank, heads * (model.qk_nope_head_dim + v))
    if model.q_lora_rank is None:
        return [Product("q and kv down", tokens, hidden, heads * qk + kv_down)], [kv_up]
    down = Product("q and kv down", tokens, hidden, model.q_lora_rank + kv_down)
    return [down], [Product("q up", tokens, model.q_lora_rank, heads * qk), kv_up]


def experts(model: ModelConfig, shape: Shape, recompute: RecomputeConfig) -> Phases:
    """Routed experts of a MoE block, from the rows that arrived to those that go back."""
    hidden, rows = model.hidden_size, shape.rows
    arriving = (1 if shape.fp8 else BF16) * rows * hidden
    order = [Move("rows in order", 2 * arriving), Move("rows back", 2 * BF16 * rows * hidden)]
    part = _gated("experts", rows, hidden, model.expert_ffn_size, shape, recompute, shape.local_experts)
    return Phases((*order, *part.forward), (*order, *part.input_grad), part.weight_grad)


def shared(model: ModelConfig, shape: Shape, recompute: RecomputeConfig) -> Phases:
    """Shared experts of a MoE block, as one FFN."""
    width = model.num_shared_experts * model.expert_ffn_size
    return _gated("shared", shape.tokens, model.hidden_size, width, shape, recompute)


def dense(model: ModelConfig, shape: Shape, recompute: RecomputeConfig) -> Phases:
    """The FFN of a dense block."""
    return _gated("ffn", shape.tokens, model.hidden_size, model.ffn_size, shape, recompute)


def _gated(
    name: str, rows: float, hidden: int, width: int, shape: Shape, recompute: RecomputeConfig, groups: int = 1
) -> Phases:
    """SwiGLU: gate and up in one product, their product, down."""
    up = Product(f"{name} gate and up", rows, hidden, 2 * width, groups)
    down = Product(f"{name} down", rows, width, hidden, groups)
    item = 1 if shape.fp8 else BF16
    swiglu = Move(f"{name} SwiGLU", rows * width * (2 * BF16 + item))
    back = Move(f"{name} SwiGLU backward", rows * width * (3 * BF16 + 2 * item))
    # Rows of experts arrive cast; those of the others are cast here.
    casts = [] if groups > 1 else _casts(shape, [up])
    again = [swiglu] if recompute.swiglu or shape.fp8 else []  # FP8 never keeps what SwiGLU gives
    grads = [of_input(down), of_input(up)]
    return Phases(
        (*casts, up, swiglu, down),
        (*again, *_casts(shape, [grads[0]]), grads[0], back, grads[1]),
        (*_column_casts(shape, [up, down]), of_weight(down), of_weight(up)),
    )


def of_input(product: Product) -> Product:
    """The product that gives the gradient of its input."""
    return replace(product, name=f"{product.name}, dX", inner=product.outer, outer=product.inner)


def of_weight(product: Product) -> Product:
    """The product that gives the gradient of its weight."""
    return replace(product, name=f"{product.name}, dW", weight=True)


def _norm(name: str, tokens: float, width: float) -> Move:
    return Move(name, BF16 * 2 * tokens * width)


def _casts(shape: Shape, products: Iterable[Product]) -> list[Move]:
    """BF16 read, FP8 and its scales written, of the input of each product."""
    if not shape.fp8:
        return []
    return [Move(f"cast for {one.name}", one.rows * one.inner * (BF16 + 1 + 4 / 128)) for one in products]


def _column_casts(shape: Shape, products: Iterable[Product]) -> list[Move]:
    """For weight gradients both factors are cast again along rows: input and output gradient."""
    if not shape.fp8:
        return []
    return [
        Move(f"columns for {one.name}", one.rows * (one.inner * 2 + one.outer * (BF16 + 1)))
        for one in products
    ]
