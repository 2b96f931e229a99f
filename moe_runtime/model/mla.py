"""Multi-head latent attention. Ref: DSV3 (1)-(11).

Queries, keys and values grow out of narrow latents; keys share one rotary part. The pieces

    q_a, q_a_norm -> latent c_q -> q_b \\
    kv_a -> latent, rotary key; kv_a_norm -> c_kv -> kv_b -> heads (rotate, join) -> attention -> o

Two things are done for speed. `_Heads` writes queries, keys and values straight into the layout that
attention reads, with one node on the tape instead of a dozen slices and joins, and on a GPU one kernel. And
on the CPU v is padded with zeros to the width of q and k, for its flash kernel wants equal widths; without it
attention takes the slow path, which writes out the whole score matrix. On a GPU cuDNN takes v as it is, and
padded it takes half as long again.

With `recompute_up`, attention keeps its output and row sums, but q, k and v (by far the largest
activations of a layer) are made again from the latents: saved-tensor hooks around the kernel recognise
the three by address. This works with every kernel and dtype, where calling one kernel's backward by
hand would tie us to that kernel.

Attention keeps its output for its backward, and `o` reads the same values. With `share_output` set, one form
of them is kept for both, as small as whoever set it makes it. Ref: DSV3 §3.3.3 (E5M6)
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from moe_runtime.config.schema import ModelConfig, RecomputeConfig
from moe_runtime.model.linear import Linear
from moe_runtime.model.norm import RMSNorm
from moe_runtime.model.product import widens
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.rope import Rotary, rotate

Heads = tuple[Tensor, Tensor, Tensor]
# share_output(x): a source of x [batch, seq, heads x v] for `o`, and what makes its values for attention.
ShareOutput = Callable[[Tensor], tuple[Recomputed[Any], Callable[[], Tensor]]]


def _pads_value(x: Tensor) -> bool:
    """Whether attention wants v as wide as q and k."""
    return not x.is_cuda


def _kernels(q: Tensor, rope: int) -> ModuleType | None:
    """Heads in one kernel each way, where this device has it."""
    if not q.is_cuda:
        return None
    from moe_runtime.model import heads_triton  # brings triton

    return heads_triton if heads_triton.serves(q, rope) else None


def _join_heads(q: Tensor, kv: Tensor, k_rope: Tensor, turns: Tensor, v_dim: int, v_width: int) -> Heads:
    """q, k, v [batch, seq, heads, width] from the up-projections; v gets zeros up to `v_width`.

    Args:
        q: [batch, seq, heads, nope + rope]; kv: [batch, seq, heads, nope + v].
        k_rope: [batch, seq, rope]; turns: complex [seq, rope / 2].
    """
    kernels = _kernels(q, k_rope.shape[-1])
    if kernels is not None and v_width == v_dim:
        joined: Heads = kernels.join_heads(q, kv, k_rope, turns)
        return joined
    nope = kv.shape[-1] - v_dim
    kind = torch.float32 if widens(q) else q.dtype
    high = torch.promote_types(kind, torch.float32)
    query = q.new_empty(q.shape, dtype=kind)
    query[..., :nope] = q[..., :nope]
    query[..., nope:] = rotate(q[..., nope:].to(high), turns)
    key = torch.empty_like(query)
    key[..., :nope] = kv[..., :nope]
    key[..., nope:] = rotate(k_rope.unsqueeze(2).to(high), turns)
    value = q.new_empty((*kv.shape[:-1], v_width), dtype=kind)
    value[..., :v_dim] = kv[..., nope:]
    if v_width > v_dim:
        value[..., v_dim:] = 0
    return query, key, value


class _Heads(torch.autograd.Function):
    """`_join_heads` with its backward; keeps nothing but the table of turns."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, k_rope: Tensor, turns: Tensor, v_dim: int, v_width: int
    ) -> Heads:
        ctx.save_for_backward(turns)
        ctx.v_dim, ctx.kind, ctx.nope = v_dim, q.dtype, kv.shape[-1] - v_dim
        query, key, value = _join_heads(q, kv, k_rope, turns, v_dim, v_width)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_query: Tensor, d_key: Tensor, d_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        nope, v_dim, back = ctx.nope, ctx.v_dim, ctx.saved_tensors[0].conj()
        d_query, d_key, d_value = (d.transpose(1, 2) for d in (d_query, d_key, d_value))
        kernels = _kernels(d_query, 2 * back.shape[1])
        if kernels is not None and d_value.shape[-1] == v_dim:
            return *kernels.part_heads(d_query, d_key, d_value, ctx.saved_tensors[0]), None, None, None
        high = torch.promote_types(d_query.dtype, torch.float32)
        d_q = torch.empty(d_query.shape, dtype=ctx.kind, device=d_query.device)
        d_q[..., :nope] = d_query[..., :nope]
        d_q[..., nope:] = rotate(d_query[..., nope:].to(high), back)
        d_kv = d_q.new_empty((*d_key.shape[:-1], nope + v_dim))
        d_kv[..., :nope] = d_key[..., :nope]
        d_kv[..., nope:] = d_value[..., :v_dim]
        d_k_rope = rotate(d_key[..., nope:].sum(dim=2, keepdim=True, dtype=high), back).squeeze(2)
        return d_q, d_kv, d_k_rope.to(ctx.kind), None, None, None


class _Saved:
    """One tensor that attention saved for its backward; may be swapped for a way to make it again."""

    def __init__(self, value: Tensor) -> None:
        self.value: Tensor | None = value
        self.again: Callable[[], Tensor] | None = None

    def take(self) -> Tensor:
        if self.value is not None:
            return self.value
        assert self.again is not None, "a saved tensor without a way to make it"
        with torch.no_grad():
            return self.again()


def _attend(
    heads: Heads, mask: Tensor | None, scale: float, remake: Recomputed[Heads] | None, watched: bool
) -> tuple[Tensor, list[_Saved]]:
    """Causal attention over [batch, heads, seq, width]; q, k, v are not kept if `remake` is given.

    Args:
        watched: also say where attention saved its output.

    Returns:
        The output, and those of the saved tensors that are it.
    """
    query, key, value = heads

    def run() -> Tensor:
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale
        )

    if remake is None and not watched:
        return run(), []
    places = {(x.data_ptr(), x.shape): number for number, x in enumerate(heads)} if remake else {}
    boxes: list[_Saved] = []

    def pack(tensor: Tensor) -> _Saved | int:
        number = places.get((tensor.data_ptr(), tensor.shape))
        if number is not None:
            return number
        boxes.append(_Saved(tensor))
        return boxes[-1]

    def unpack(saved: _Saved | int) -> Tensor:
        if isinstance(saved, _Saved):
            return saved.take()
        assert remake is not None, "only what is made again has a number"
        return remake.take()[saved]

    with saved_tensors_hooks(pack, unpack):
        out = run()
    mine = [box for box in boxes if watched and box.value is not None and _is_same(box.value, out)]
    return out, mine


def _is_same(saved: Tensor, out: Tensor) -> bool:
    return saved.data_ptr() == out.data_ptr() and saved.shape == out.shape and saved.dtype == out.dtype


class MLA(nn.Module):
    """Multi-head latent attention of one layer. Ref: DSV3 (1)-(11).

    Args:
        config: widths.
        rotary: tables shared by all layers.
        recompute: what backward makes again.
    """

    def __init__(
        self,
        config: ModelConfig,
        rotary: Rotary,
        recompute: RecomputeConfig,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config, self.rotary, self.recompute = config, rotary, recompute
        self.nope, self.rope, self.v = (
            config.qk_nope_head_dim,
            config.qk_rope_head_dim,
            config.v_head_dim,
        )
        width = self.nope + self.rope
        heads, hidden, eps = config.num_heads, config.hidden_size, config.rms_norm_eps
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        if config.q_lora_rank is None:
            self.q = Linear(hidden, heads * width, **kind)
        else:
            self.q_a = Linear(hidden, config.q_lora_rank, **kind)
            self.q_a_norm = RMSNorm(config.q_lora_rank, eps, **kind)
            self.q_b = Linear(config.q_lora_rank, heads * width, **kind)
        self.kv_a = Linear(hidden, config.kv_lora_rank + self.rope, **kind)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, eps, **kind)
        self.kv_b = Linear(config.kv_lora_rank, heads * (self.nope + self.v), **kind)
        self.o = Linear(heads * self.v, hidden, **kind)
        self.scale = width**-0.5 * rotary.softmax_factor
        self.share_output: ShareOutput | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None, source: Recomputed[Any] | None = None) -> Tensor:
        """Attend within each sequence, causally.

        Args:
            x: normed stream [batch, seq, hidden].
            mask: bool [batch, 1, seq, seq], True where a position (third axis) may look; None: causal.
            source: makes x again in backward; asked twice.

        Returns:
            [batch, seq, hidden].
        """
        latent, k_rope = self.kv_a(x, source).split([self.config.kv_lora_rank, self.rope], dim=-1)
        c_kv, kv_source = self._norm(self.kv_a_norm, latent)
        if self.config.q_lora_rank is None:
            c_q, q_source, up = x, source, self.q
        else:
            c_q, q_source = self._norm(self.q_a_norm, self.q_a(x, source))
            up = self.q_b
        remakes = self.recompute.mla_up and torch.is_grad_enabled()
        if remakes:  # each latent is read twice in backward: one form of it is kept for both
            q_source = up.multiplier.keep(c_q, 2) if q_source is None else q_source
            kv_source = self.kv_b.multiplier.keep(c_kv, 2) if kv_source is None else kv_source
        q, kv = self._split(up(c_q, q_source)), self._split(self.kv_b(c_kv, kv_source))
        turns = self._turns(x)
        width = max(self.nope + self.rope, self.v) if _pads_value(x) else self.v
        heads: Heads = _Heads.apply(q, kv, k_rope, turns, self.v, width)
        remake = None
        if remakes:
            assert q_source is not None and kv_source is not None, "latents are kept above"
            again = (q_source, up), (kv_source, self.kv_b)
            remake = self._remake(*again, k_rope.detach(), x.shape[:-1], turns, width)
        shares = self.share_output is not None and torch.is_grad_enabled()
        out, saved = _attend(heads, mask, self.scale, remake, shares)
        flat = out[..., : self.v].transpose(1, 2).flatten(2).to(x.dtype)
        return self.o(flat, self._share(flat, out, saved) if shares else None)

    def _share(self, flat: Tensor, out: Tensor, saved: list[_Saved]) -> Recomputed[Any]:
        """Keep one form of attention's output, for attention itself and for `o`."""
        assert self.share_output is not None
        source, values = self.share_output(flat.detach())
        shape, dtype, width = flat.shape, out.dtype, out.shape[-1]

        def again() -> Tensor:
            heads = self._split(values().view(shape)).to(dtype)
            padded = nn.functional.pad(heads, (0, width - self.v)) if width > self.v else heads
            return padded.transpose(1, 2)

        for box in saved:
            box.value, box.again = None, again
        return source

    def num_source_users(self) -> int:
        """How often one backward asks `source` of `forward`."""
        full = self.config.q_lora_rank is None
        return 3 if full and self.recompute.mla_up else 2

    def _norm(self, norm: RMSNorm, x: Tensor) -> tuple[Tensor, Recomputed[Tensor] | None]:
        """A latent's norm, and what makes it again if it is not to be kept."""
        users = 2 if self.recompute.mla_up else 1
        return norm(x), norm.recomputed(x, users) if self.recompute.norm else None

    def _split(self, flat: Tensor) -> Tensor:
        return flat.unflatten(-1, (self.config.num_heads, -1))

    def _turns(self, x: Tensor) -> Tensor:
        high = torch.promote_types(x.dtype, torch.float32)
        return self.rotary.table(x.shape[1], high, x.device)

    def _remake(
        self,
        query: tuple[Recomputed[Any], Linear],
        latent: tuple[Recomputed[Any], Linear],
        k_rope: Tensor,
        lead: torch.Size,
        turns: Tensor,
        width: int,
    ) -> Recomputed[Heads]:
        """Queries, keys and values from their latents, once for the three of them."""

        def lift(source: Recomputed[Any], up: Linear) -> Tensor:
            return self._split(up.multiplier.again(source.take(), up.weight).view(*lead, -1))

        def make() -> Heads:
            q, kv = lift(*query), lift(*latent)
            q, k, v = _join_heads(q, kv, k_rope, turns, self.v, width)
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

        return Recomputed(make, users=3)


def document_mask(tokens: Tensor, separator: int) -> Tensor:
    """Who may look at whom when attention stays within documents.

    Args:
        tokens: int64 [batch, seq].
        separator: the token that ends a document; it belongs to the document it ends.

    Returns:
        bool [batch, 1, seq, seq], True where a position (third axis) may look at another (fourth).
    """
    ends = (tokens == separator).to(torch.int64)
    document = ends.cumsum(dim=1) - ends
    same = document.unsqueeze(2) == document.unsqueeze(1)
    return same.tril().unsqueeze(1)
