"""What each part of a model keeps between forward and backward, tensor by tensor.

It follows what our modules save (`model/`), not a formula: whoever changes a `save_for_backward` changes a
line here, and a test that measures a run says so. Three settings change the list:

- `recompute.norm`: outputs of norms are made again from their inputs, which then stay until W;
  `recompute.swiglu`: products of gate and up; `recompute.mla_up`: queries, keys and values.
- FP8: what a product read is kept as the tiles that it multiplied; SwiGLU keeps its factors as tiles and
  never their product; attention's output is kept once, in E5M6, for itself and for the linear behind it.
- the device (`Keeping`).

Names in the lists are the tensors'. Widths of FP8 forms are in `casts.py`. Rejected: bytes a layer as one
formula, such as Megatron's 34 s b h: it cannot say what one more setting saves, and is wrong for MLA and MoE.

Ref: DSV3 §3.2.3 (recompute), §3.3.3 (cached activations)
"""

from collections.abc import Iterator

from moe_runtime.config.schema import RunConfig
from moe_runtime.planner.reckon.casts import TILE, columns, packed, tiles
from moe_runtime.planner.reckon.kept import Keeping, Kept, Life
from moe_runtime.planner.reckon.kernels import BF16
from moe_runtime.planner.reckon.states import ITEM

INDEX = 8  # int64
HEAD_KEEPS_BYTES = 64 * 2**20  # as `model/loss.py`: a head gradient up to this size is made in forward


class Activations:
    """Lists of what a run keeps.

    Args:
        config: widths, precision, recompute.
        keeping: the device.
    """

    def __init__(self, config: RunConfig, keeping: Keeping) -> None:
        self._config, self._model, self._again = config, config.model, config.recompute
        self._keeping = keeping
        self._item = ITEM[config.precision]
        self._high = max(4, self._item)
        self._grad = (keeping.gradient_bytes if self._item == BF16 else None) or self._item

    def block(self, name: str, is_moe: bool) -> list[Kept]:
        """Of one block; its output, which the next one keeps, not included.

        Args:
            name: canonical, such as layers.3 or mtp.0.block.
        """
        parts = [*self._attention(name), *self._ffn_norm(name, is_moe)]
        if not is_moe:
            return [*parts, *self._gated(f"{name}.ffn", self._model.ffn_size)]
        shared = self._model.num_shared_experts * self._model.expert_ffn_size
        parts += [*self._router(), *self._experts(f"{name}.moe.experts")]
        return parts + (list(self._gated(f"{name}.moe.shared", shared)) if shared else [])

    def loss(self, hidden_is_read: bool) -> list[Kept]:
        """Final norm, head and loss.

        Args:
            hidden_is_read: an MTP module goes on from the normed stream.
        """
        stream = self._model.hidden_size * self._item
        table = self._model.vocab_size * self._model.hidden_size
        found = [Kept("norm input", stream), self._rstd(1)]
        if 4 * table <= HEAD_KEEPS_BYTES:
            found += [Kept("gradient of hidden", stream), Kept("gradient of head", once=self._high * table)]
            return found + ([Kept("hidden", stream)] if hidden_is_read else [])
        return [*found, Kept("hidden", stream), Kept("log-sums", self._high)]

    def mtp(self, depth: int) -> list[Kept]:
        """One MTP module, its block and its loss. Ref: DSV3 (21)-(24)"""
        stream = self._model.hidden_size * self._item
        found = [Kept("embedded", stream, life=self._norm_input), self._rstd(2)]
        if not self._again.norm:
            found.append(Kept("joined", 2 * stream, life="to_weight_grad"))
        found += [self._owed("eh_proj", self._model.hidden_size)]
        found += self.block(f"mtp.{depth}.block", True)
        return found + self.loss(depth + 1 < self._model.mtp_depth)

    # -- attention -------------------------------------------------------------------------------

    def _attention(self, name: str) -> Iterator[Kept]:
        model, again = self._model, self._again
        stream = model.hidden_size * self._item
        first = ["attn.kv_a", "attn.q" if model.q_lora_rank is None else "attn.q_a"]
        yield Kept("attn_norm input", stream, life=self._norm_input)
        yield self._rstd(1)
        if not again.norm:
            yield from self._inputs("attn_norm output", model.hidden_size, [f"{name}.{one}" for one in first])
        if model.attention == "mha":
            yield from self._mha_heads(name)
            return
        yield from self._latent(name, "kv", model.kv_lora_rank, model.qk_rope_head_dim, "attn.kv_b")
        yield self._owed(f"{name}.attn.kv_b", model.num_heads * (model.qk_nope_head_dim + model.v_head_dim))
        qk = model.num_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        if model.q_lora_rank is not None:
            yield from self._latent(name, "q", model.q_lora_rank, 0, "attn.q_b")
            yield self._owed(f"{name}.attn.q_b", qk)
        else:
            yield self._owed(f"{name}.attn.q", qk)
        if not again.mla_up:
            yield from self._heads()
        yield from self._output(name)

    def _latent(self, name: str, which: str, width: int, rope: int, reader: str) -> Iterator[Kept]:
        """A latent's norm and what its up-projection reads; `rope` lies beside the latent in memory."""
        yield Kept(f"{which} latent", (width + rope) * self._item, life=self._norm_input)
        yield self._rstd(1)
        yield self._owed(f"{name}.attn.{which}_a", width + rope)
        if not self._again.norm:
            yield from self._inputs(f"normed {which} latent", width, [f"{name}.{reader}"])
        elif self._again.mla_up:
            # Made again for attention's backward, and held for the weight gradient.
            once = width * self._item + (tiles(width) if self._is_fp8(f"{name}.{reader}") else 0)
            yield Kept(f"normed {which} latent", once, life="between")

    def _heads(self) -> Iterator[Kept]:
        model = self._model
        item = self._keeping.attention_bytes or self._item
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        yield Kept("query", model.num_heads * qk * item)
        yield Kept("key", model.num_heads * qk * item)
        yield Kept("value", model.num_heads * self._value_width * item)

    def _mha_heads(self, name: str) -> Iterator[Kept]:
        model = self._model
        qk = model.num_heads * (model.qk_nope_head_dim + model.qk_rope_head_dim)
        for part, width in (("q", qk), ("k", qk), ("v", model.num_heads * model.v_head_dim)):
            yield self._owed(f"{name}.attn.{part}", width)
        yield from self._heads()
        yield from self._output(name)

    def _output(self, name: str) -> Iterator[Kept]:
        """Attention's output, which it keeps itself and the linear behind it reads."""
        model, reader = self._model, f"{name}.attn.o"
        item = self._keeping.attention_bytes or self._item
        width, wide = model.num_heads * model.v_head_dim, model.num_heads * self._value_width
        yield Kept("softmax log-sums", model.num_heads * self._high)
        yield self._owed(reader, model.hidden_size)
        if self._is_fp8(reader) and self._config.fp8.attention_output == "e5m6":
            yield Kept("attention output", packed(width), life="to_weight_grad")
            return
        if self._is_fp8(reader):
            yield Kept("o input", tiles(width), life="to_weight_grad")
        elif wide > width or item != self._item:
            yield Kept("o input", width * self._item, life="to_weight_grad")
        else:  # one tensor for both
            yield Kept("attention output", wide * item, life="to_weight_grad")
            return
        yield Kept("attention output", wide * item)

    @property
    def _value_width(self) -> int:
        model = self._model
        qk = model.qk_nope_head_dim + model.qk_rope_head_dim
        return max(qk, model.v_head_dim) if self._keeping.pads_value else model.v_head_dim

    # -- FFN -------------------------------------------------------------------------------------

    def _ffn_norm(self, name: str, is_moe: bool) -> Iterator[Kept]:
        yield Kept("ffn_norm input", self._model.hidden_size * self._item, life=self._norm_input)
        yield self._rstd(1)
        if self._again.norm:
            return
        hidden = self._model.hidden_size
        if not is_moe:
            yield from self._inputs("ffn_norm output", hidden, [f"{name}.ffn"])
            return
        # The router keeps the values, and they carry the tiles that were dispatched.
        yield Kept("ffn_norm output", hidden * self._item, life="to_weight_grad")
        if any(self._is_fp8(f"{name}.moe.{part}") for part in ("shared", "experts")):
            yield Kept("ffn_norm output, tiles", tiles(hidden), life="to_weight_grad")
            yield Kept("exponents of tiles", -(-hidden // TILE), life="to_weight_grad")

    def _gated(self, name: str, width: int) -> Iterator[Kept]:
        """A dense SwiGLU."""
        yield self._owed(name, 2 * width)
        yield self._owed(name, self._model.hidden_size)
        if self._is_fp8(name):
            yield Kept("gate and up", tiles(2 * width), life="to_weight_grad")
            return
        life: Life = "to_weight_grad" if self._again.swiglu else "to_input_grad"
        yield Kept("gate and up", 2 * width * self._item, life=life)
        if not self._again.swiglu:
            yield Kept("SwiGLU", width * self._item, life="to_weight_grad")

    def _router(self) -> Iterator[Kept]:
        """Scores of all experts, what was chosen, and the order in which rows travel."""
        experts, top_k = self._model.num_experts, self._model.top_k
        scores = 2 + self._keeping.joins_router  # logits, and the softmax of their log-sigmoid
        yield Kept("router scores", scores * self._high * experts)
        yield Kept("gate weights", (INDEX + self._high) * top_k)
        yield Kept("order of rows", 3 * INDEX * top_k + INDEX)
        if self._config.layout.ep > 1:
            yield Kept("order of arrival", row=2 * INDEX)
        yield Kept("router, gradient", self._high * experts, life="between")

    def _experts(self, name: str) -> Iterator[Kept]:
        """Routed experts; Ref: DSV3 (12). Rows are those that arrive here."""
        hidden, width, keeping = self._model.hidden_size, self._model.expert_ffn_size, self._keeping
        yield Kept("row weights", row=self._high, life="to_weight_grad")
        if keeping.weighs_after:
            yield Kept("expert output", row=hidden * self._item)
        if self._is_fp8(name):
            yield Kept("rows", row=tiles(hidden), life="to_weight_grad")
            yield Kept("experts' gate and up", row=tiles(2 * width), life="to_weight_grad")
            yield Kept("experts' gradients", row=columns(2 * width + hidden), life="between")
            return
        yield Kept("rows", row=hidden * self._item, life="to_weight_grad")
        grouped = keeping.grouped and self._item == BF16
        life: Life = "to_input_grad" if grouped else "to_weight_grad"
        yield Kept("experts' gate and up", row=2 * width * self._item, life=life)
        product = keeping.product_bytes or (0 if grouped else self._item)
        if product and not self._again.swiglu:
            yield Kept("experts' SwiGLU", row=width * product, life="to_weight_grad")
        elif grouped:
            yield Kept("experts' SwiGLU", row=width * self._item, life="between")
        yield Kept("experts' gradients", row=(2 * width + hidden) * self._grad, life="between")

    # -- shared ----------------------------------------------------------------------------------

    def _is_fp8(self, name: str) -> bool:
        return self._config.precision == "fp8" and self._config.fp8.multiplies(name)

    @property
    def _norm_input(self) -> Life:
        """A norm's backward needs its input; where its output is made again, so does W."""
        return "to_weight_grad" if self._again.norm else "to_input_grad"

    def _rstd(self, count: int) -> Kept:
        return Kept("norm scales", count * self._high)

    def _inputs(self, what: str, width: int, readers: list[str]) -> Iterator[Kept]:
        """What products read, once in each form that one of them wants."""
        fp8 = [self._is_fp8(reader) for reader in readers]
        if any(fp8):
            yield Kept(f"{what}, tiles", tiles(width), life="to_weight_grad")
        if not all(fp8):
            yield Kept(what, width * self._item, life="to_weight_grad")

    def _owed(self, name: str, width: int) -> Kept:
        """The gradient of a product's output, which its weight gradient waits for."""
        size = columns(width) if self._is_fp8(name) else width * self._grad
        return Kept(f"gradient for {name.rsplit('.', 1)[-1]}", size, life="between")
