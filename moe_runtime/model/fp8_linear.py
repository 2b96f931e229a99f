"""A linear layer whose products are FP8, and whose input is kept in FP8. Ref: DSV3 §3.3.1, §3.3.3.

    forward    x -> tiles (or those that x carries) -> y = x W^T;  the tiles are kept, x is not
    backward   dy -> rows and columns, in one read;  dx = rows W;  the columns wait for W
    W          kept tiles -> columns;  dW = columns^T columns, added in FP32

So a weight gradient that is deferred holds one byte a value of x and one of dy. The linear after attention is
handed a source of its input in E5M6, which attention keeps for itself; see `mla.py`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from moe_comm.wire.carried import decoded
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_runtime.fp8.tiled import Tiles
from moe_runtime.fp8.watch import ROWS
from moe_runtime.model.fp8_operands import Gradient, Kit, Products, flat, tiles_of, wgrad_operand
from moe_runtime.model.product import product
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.weight_grad import deliver


@dataclass(frozen=True)
class Fp8Multiplier:
    """What multiplies in a `Linear` under the policy.

    Args:
        kit: which products are FP8, and what makes tiles.
    """

    kit: Kit

    def __call__(self, x: Tensor, weight: Tensor, source: Recomputed[Any] | None = None) -> Tensor:
        out: Tensor = _Fp8Linear.apply(x, weight, source, self)
        return out

    def keep(self, x: Tensor, users: int) -> Recomputed[Any]:
        """A source of tiles."""
        tiles = tiles_of(x, self.kit.casts)
        return Recomputed(lambda: tiles, users)

    def again(self, kept: Any, weight: Tensor) -> Tensor:
        """The product of tiles, or of a tensor that carries them."""
        return self.multiply(kept, weight)[0]

    def multiply(self, x: Tensor | Tiles, weight: Tensor) -> tuple[Tensor, Tiles | None]:
        """The product [m, out], and the tiles of x if it was done in them."""
        products, casts = Products(self.kit), self.kit.casts
        if self.kit.choice.fprop:
            tiles = tiles_of(x, casts)
            out = products.forward(tiles, weight, weight.dtype)
            if self.kit.watch.is_on and isinstance(x, Tensor):
                self._show(x, tiles, weight, out)
            return out, tiles
        plain = casts.decode(x, weight.dtype) if isinstance(x, Tiles) else flat(decoded(x))
        return products.forward(plain, weight, weight.dtype), None

    def _show(self, x: Tensor, tiles: Tiles, weight: Tensor, out: Tensor) -> None:
        """Let the watch see the input, and the product of some rows beside that in the weight's dtype."""
        rows = flat(x)[:ROWS]
        self.kit.watch.saw("input", rows, tiles)
        self.kit.watch.saw_product(product(rows, weight.detach().t(), weight.dtype), out[:ROWS])


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, source: Recomputed[Any] | None, how: Fp8Multiplier
    ) -> Tensor:
        out, tiles = how.multiply(x, weight)
        ctx.weight, ctx.source, ctx.how, ctx.shape, ctx.dtype = weight, source, how, x.shape, x.dtype
        if source is None and ctx.needs_input_grad[1]:
            tiles = tiles_of(x, how.kit.casts) if tiles is None else tiles
            ctx.save_for_backward(tiles.codes, tiles.scales)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, source, how = ctx.weight, ctx.source, ctx.how
        kit, products = how.kit, Products(how.kit)
        grad = Gradient.cast(d_out, kit)
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = products.back(grad, weight, ctx.dtype).view(ctx.shape)
        grad.rows = None
        if ctx.needs_input_grad[1]:
            saved = ctx.saved_tensors

            def write(out: Tensor, accumulate: bool) -> None:
                kept = Tiles(*saved) if source is None else source.take()
                products.write(out, grad, wgrad_operand(kept, kit, weight.dtype), accumulate)

            d_weight = deliver(weight, write)
        return d_x, d_weight, None, None
