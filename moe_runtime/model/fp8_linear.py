"""A linear layer whose products are FP8, and whose input is kept in FP8. Ref: DSV3 §3.3.1, §3.3.3.

    forward    x -> tiles (or those that x carries) -> y = x W^T;  the tiles are kept, x is not
    backward   dy -> rows and columns, in one read;  dx = rows W;  the columns wait for W
    W          kept tiles -> columns;  dW = columns^T columns, added in FP32

So a weight gradient that is deferred holds one byte a value of x and one of dy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from moe_comm.wire.carried import decoded
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_runtime.fp8.tiled import Groups, Tiles
from moe_runtime.model.fp8_operands import Casts, Gradient, Kept, Kit, Products, flat, tiles_of
from moe_runtime.model.recompute import Recomputed
from moe_runtime.model.weight_grad import deliver


class KeptForm(Protocol):
    """A form in which an input is kept: `Kept`, or another with its methods."""

    def tensors(self) -> tuple[Tensor, ...]: ...

    def columns(self, casts: Casts, groups: Groups | None) -> Tiles: ...

    def plain(self, casts: Casts, dtype: torch.dtype) -> Tensor: ...


class Keeper(Protocol):
    """Brings an input into the form in which it is kept, and back from what autograd saved."""

    def keep(self, x: Tensor, tiles: Tiles | None, casts: Casts) -> KeptForm: ...

    def restore(self, tensors: Sequence[Tensor], width: int) -> KeptForm: ...


class KeepsTiles:
    """The tiles that are multiplied are kept."""

    def keep(self, x: Tensor, tiles: Tiles | None, casts: Casts) -> KeptForm:
        return Kept(tiles_of(x, casts) if tiles is None else tiles)

    def restore(self, tensors: Sequence[Tensor], width: int) -> KeptForm:
        return Kept.of(tensors)


@dataclass(frozen=True)
class Fp8Multiplier:
    """What multiplies in a `Linear` under the policy.

    Args:
        kit: which products are FP8, and what makes tiles.
        keeper: how the input is kept.
    """

    kit: Kit
    keeper: Keeper = KeepsTiles()

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
            return products.forward(tiles, weight, weight.dtype), tiles
        plain = casts.decode(x, weight.dtype) if isinstance(x, Tiles) else flat(decoded(x))
        return products.forward(plain, weight, weight.dtype), None

    def taken(self, source: Recomputed[Any]) -> KeptForm:
        """What a source gives, in one of its requests."""
        return Kept(tiles_of(source.take(), self.kit.casts))


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, source: Recomputed[Any] | None, how: Fp8Multiplier
    ) -> Tensor:
        out, tiles = how.multiply(x, weight)
        ctx.weight, ctx.source, ctx.how, ctx.shape, ctx.dtype = weight, source, how, x.shape, x.dtype
        if source is None and ctx.needs_input_grad[1]:
            ctx.save_for_backward(*how.keeper.keep(x, tiles, how.kit.casts).tensors())
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weight, source, how = ctx.weight, ctx.source, ctx.how
        kit, products, width = how.kit, Products(how.kit), ctx.shape[-1]
        grad = Gradient.cast(d_out, kit)
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            d_x = products.back(grad, weight, ctx.dtype).view(ctx.shape)
        grad.rows = None
        if ctx.needs_input_grad[1]:
            saved = ctx.saved_tensors

            def write(out: Tensor, accumulate: bool) -> None:
                kept = how.keeper.restore(saved, width) if source is None else how.taken(source)
                x = kept.columns(kit.casts, None) if kit.choice.wgrad else kept.plain(kit.casts, weight.dtype)
                products.write(out, grad, x, accumulate)

            d_weight = deliver(weight, write)
        return d_x, d_weight, None, None
