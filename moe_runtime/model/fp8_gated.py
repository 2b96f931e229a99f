"""SwiGLU in FP8, dense or for groups of rows: two products and the casts between them. Ref: DSV3 §3.3.3.

    forward    x -> tiles;  h = x G^T;  p = silu(h_gate) h_up (w) -> tiles at once;  y = p D^T
               kept: tiles of x, tiles of h
    backward   dy -> rows and columns;  dp = rows D;  dh from dp and the kept h, FP32, cast both ways
               dx = rows of dh G
    W          dD = columns of dy, columns of p made again from the kept h;  dG = columns of dh, of x

h is kept in FP8 and p not at all, so `recompute.swiglu` has nothing to add. One Function holds both
products, because dh need never exist but as tiles. Experts are the same with groups of rows and the gate
weights of rows; see `experts.py` for how these flow. Rows may arrive as tiles alone, and so may gradients.
"""

from dataclasses import dataclass
from typing import Any

import torch
from moe_comm.wire.carried import decoded
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_runtime.fp8.tiled import Groups, Tiles
from moe_runtime.fp8.watch import ROWS
from moe_runtime.model.experts import times
from moe_runtime.model.ffn import SwiGLU, gated, gated_backward
from moe_runtime.model.fp8_operands import Gradient, Kit, Products, flat, tiles_of, wgrad_operand
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.weight_grad import deliver


@dataclass(frozen=True)
class Fp8FeedForward:
    """What computes a `SwiGLU` under the policy."""

    kit: Kit

    def __call__(self, ffn: SwiGLU, x: Tensor, source: Recomputed[Any] | None) -> Tensor:
        weights = ffn.gate_up.weight, ffn.down.weight
        out: Tensor = _Fp8Gated.apply(x, None, *weights, source, self.kit, None, torch.is_grad_enabled())
        return out


@dataclass(frozen=True)
class Fp8Experts:
    """What computes `Experts` under the policy."""

    kit: Kit

    def __call__(
        self,
        rows: Tensor,
        row_weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        counts: Tensor,
        recompute: bool = False,
    ) -> Tensor:
        groups, trains = Groups(counts, rows.device), torch.is_grad_enabled()
        out: Tensor = _Fp8Gated.apply(rows, row_weights, gate_up, down, None, self.kit, groups, trains)
        return out


def _gate(lifted: Tensor, row_weights: Tensor | None, kit: Kit) -> Tiles | Tensor:
    """The operand of the down projection, from its two factors [m, 2f]."""
    if not kit.choice.fprop:
        return _gate_high(lifted, row_weights)
    tiles = kit.casts.cast_gated(lifted, row_weights)
    if kit.watch.is_on:
        kit.watch.saw("input", _gate_high(lifted[:ROWS].float(), _first(row_weights)), tiles)
    return tiles


def _gate_high(lifted: Tensor, row_weights: Tensor | None) -> Tensor:
    product = gated(lifted)
    return product if row_weights is None else times(product, row_weights)


def _first(row_weights: Tensor | None) -> Tensor | None:
    """Those of the rows that are watched."""
    return None if row_weights is None else row_weights[:ROWS]


def _gate_again(
    kept: Tiles, row_weights: Tensor | None, dtype: torch.dtype, kit: Kit, groups: Groups | None
) -> Tiles | Tensor:
    """The operand of the down projection's Wgrad, from the kept factors."""
    if kit.choice.wgrad:
        return kit.casts.cast_gated_tiles(kept, row_weights, groups)
    return _gate_high(kit.casts.decode(kept, dtype), row_weights)


def _gate_backward(
    d_product: Tensor, kept: Tiles, row_weights: Tensor | None, kit: Kit, groups: Groups | None
) -> tuple[Gradient, Tensor | None]:
    """Gradients of the factors [m, 2f] and of the rows' weights."""
    if kit.choice.dgrad and kit.choice.wgrad:
        rows, columns, d_weights = kit.casts.gated_backward_cast(d_product, kept, row_weights, groups)
        if kit.watch.is_on:
            few = Tiles(kept.codes[:ROWS], kept.scales[:ROWS])
            kit.watch.saw("gradient", _lift(d_product[:ROWS], few, _first(row_weights), kit)[0], rows)
        return Gradient(rows, columns, None), d_weights
    d_lifted, d_weights = _lift(d_product, kept, row_weights, kit)
    return Gradient.cast(d_lifted.to(d_product.dtype), kit, groups), d_weights


def _lift(
    d_product: Tensor, kept: Tiles, row_weights: Tensor | None, kit: Kit
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the factors [m, 2f] in FP32, before any cast, and of the rows' weights."""
    high = kit.casts.decode(kept, torch.float32)
    pull, d_weights = d_product.float(), None
    if row_weights is not None:
        d_weights = (pull * gated(high)).sum(dim=-1)
        pull = pull * row_weights.unsqueeze(1)
    d_lifted = torch.empty_like(high, dtype=torch.promote_types(high.dtype, torch.float32))
    gated_backward(pull, high, d_lifted)
    return d_lifted, d_weights


class _Fp8Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        row_weights: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        source: Recomputed[Any] | None,
        kit: Kit,
        groups: Groups | None,
        trains: bool,
    ) -> Tensor:
        products, casts = Products(kit, groups), kit.casts
        needs_tiles = kit.choice.fprop or (trains and source is None)
        tiles = tiles_of(x, casts) if needs_tiles else None
        first = tiles if kit.choice.fprop and tiles is not None else flat(decoded(x))
        if kit.watch.is_on and tiles is not None and groups is None:  # experts' rows come over the wire
            kit.watch.saw("input", x, tiles)
        lifted = products.forward(first, gate_up, x.dtype)
        out = products.forward(_gate(lifted, row_weights, kit), down, x.dtype)
        if trains:
            kept = casts.cast_rows(lifted)
            from_x = (tiles.codes, tiles.scales) if source is None and tiles is not None else ()
            ctx.save_for_backward(row_weights, kept.codes, kept.scales, *from_x)
        ctx.gate_up, ctx.down, ctx.source, ctx.kit, ctx.groups = gate_up, down, source, kit, groups
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        row_weights, codes, scales, *from_x = ctx.saved_tensors
        kit, groups, source, dtype = ctx.kit, ctx.groups, ctx.source, ctx.dtype
        kept, products = Tiles(codes, scales), Products(kit, groups)
        d_y = Gradient.cast(d_out, kit, groups)
        d_product = products.back(d_y, ctx.down, dtype)
        d_lifted, d_weights = _gate_backward(d_product, kept, row_weights, kit, groups)
        del d_product
        d_x = products.back(d_lifted, ctx.gate_up, dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_lifted.rows = None

        def write_down(out: Tensor, accumulate: bool) -> None:
            products.write(out, d_y, _gate_again(kept, row_weights, dtype, kit, groups), accumulate)

        def write_gate_up(out: Tensor, accumulate: bool) -> None:
            x = Tiles(*from_x) if source is None else source.take()
            products.write(out, d_lifted, wgrad_operand(x, kit, dtype, groups), accumulate)

        d_down = deliver(ctx.down, write_down) if ctx.needs_input_grad[3] else None
        d_gate_up = deliver(ctx.gate_up, write_gate_up) if ctx.needs_input_grad[2] else None
        if d_weights is not None and row_weights is not None:
            d_weights = d_weights.to(row_weights.dtype)
        return d_x, d_weights, d_gate_up, d_down, None, None, None, None
