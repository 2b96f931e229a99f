"""Operands of FP8 products as a layer's forward and backward meet them.

    Kit         which products are FP8, and what makes tiles and keeps casts of weights
    Gradient    a gradient that came in, cast as the products need it, each form dropped after its last use
    Products    the three products of one weight, or of one weight for each group of rows

Tiles of a tensor may be there already: a norm cast its output as it made it, a dispatcher brought rows in
FP8. They hang on the tensor (`moe_comm.wire.carried`), and `tiles_of` finds them or casts.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from moe_comm.wire.carried import byte_scales, carry, decoded, float_scales
from moe_comm.wire.carried import tiles_of as carried_by
from torch import Tensor

from moe_runtime.fp8 import gemm
from moe_runtime.fp8.e5m6 import Packed, columns_of_packed, unpack_e5m6
from moe_runtime.fp8.policy import Choice
from moe_runtime.fp8.tiled import Blocks, Groups, Tiles
from moe_runtime.fp8.watch import Fp8Watch
from moe_runtime.fp8.weight_casts import WeightCasts
from moe_runtime.model.experts import Block, blocks_of, grouped_gemm_serves, write_blocks
from moe_runtime.model.product import product, write_product


class Casts(Protocol):
    """What makes tiles; `moe_runtime.fp8.cast` is one. Shapes and values are described there."""

    def cast_rows(self, x: Tensor) -> Tiles: ...

    def cast_columns(self, x: Tensor, groups: Groups | None = None) -> Tiles: ...

    def cast_both(self, x: Tensor, groups: Groups | None = None) -> tuple[Tiles, Tiles]: ...

    def columns_of(self, tiles: Tiles, groups: Groups | None = None) -> Tiles: ...

    def cast_gated(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tiles: ...

    def cast_gated_tiles(
        self, gate_up: Tiles, row_weights: Tensor | None = None, groups: Groups | None = None
    ) -> Tiles: ...

    def gated_backward_cast(
        self,
        d_product: Tensor,
        gate_up: Tiles,
        row_weights: Tensor | None = None,
        groups: Groups | None = None,
    ) -> tuple[Tiles, Tiles, Tensor | None]: ...

    def cast_normed(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tiles]: ...

    def decode(self, matrix: Tiles | Blocks, dtype: torch.dtype = torch.float32) -> Tensor: ...


@dataclass(frozen=True)
class Kit:
    """What a layer multiplies in FP8 with.

    Args:
        choice: which of its products are FP8.
        weights: casts of weights, shared by the model.
        casts: makes tiles.
        watch: counts what casts do, in steps that are sampled.
    """

    choice: Choice
    weights: WeightCasts
    casts: Casts
    watch: Fp8Watch = field(default_factory=Fp8Watch)


def flat(x: Tensor) -> Tensor:
    """x [..., k] as [m, k]."""
    return x.reshape(-1, x.shape[-1])


def hang(x: Tensor, tiles: Tiles) -> Tensor:
    """Let x [..., k] carry its tiles, whose scales are powers of two; gives x."""
    scales = byte_scales(tiles.scales)
    # What travels is bytes. Where it does not, readers get the numbers back as the cast laid them out.
    scales.as_numbers = tiles.scales  # type: ignore[attr-defined]
    return carry(x, tiles.codes, scales)


def tiles_of(x: Tensor | Tiles, casts: Casts) -> Tiles:
    """Tiles [m, k] of x [..., k]: those that it carries, or new ones."""
    if isinstance(x, Tiles):
        return x
    carried = carried_by(x)
    if carried is not None:
        codes, scales = carried
        numbers = getattr(scales, "as_numbers", None)
        return Tiles(codes, float_scales(scales) if numbers is None else numbers)
    return casts.cast_rows(flat(x))


def wgrad_operand(
    kept: Tensor | Tiles | Packed, kit: Kit, dtype: torch.dtype, groups: Groups | None = None
) -> Tiles | Tensor:
    """What a weight gradient multiplies, from an input as it was kept or made again.

    Args:
        kept: tiles of x [m, k], x in E5M6, or x [..., k] itself made again, which may carry tiles.

    Returns:
        Tiles [k, padded m], or where Wgrad stays high values [m, k] of dtype.
    """
    if isinstance(kept, Packed):
        return columns_of_packed(kept, groups) if kit.choice.wgrad else unpack_e5m6(kept, dtype)
    tiles = tiles_of(kept, kit.casts)
    return kit.casts.columns_of(tiles, groups) if kit.choice.wgrad else kit.casts.decode(tiles, dtype)


@dataclass
class Gradient:
    """A gradient [m, n], in the forms that its products want; the others are None."""

    rows: Tiles | None
    columns: Tiles | None
    plain: Tensor | None

    @classmethod
    def cast(cls, d_out: Tensor, kit: Kit, groups: Groups | None = None) -> "Gradient":
        """Of d_out [..., n], which may be tiles alone; one read for both casts."""
        dgrad, wgrad, casts = kit.choice.dgrad, kit.choice.wgrad, kit.casts
        plain = None if dgrad and wgrad else flat(decoded(d_out))
        if carried_by(d_out) is not None:
            rows = tiles_of(d_out, casts)
            return cls(rows if dgrad else None, casts.columns_of(rows, groups) if wgrad else None, plain)
        if dgrad and wgrad:
            rows, columns = casts.cast_both(flat(d_out), groups)
            if kit.watch.is_on:
                kit.watch.saw("gradient", d_out, rows)
            return cls(rows, columns, None)
        assert plain is not None, "a gradient of which no product is high"
        if dgrad:
            rows = casts.cast_rows(plain)
            if kit.watch.is_on:
                kit.watch.saw("gradient", plain, rows)
            return cls(rows, None, plain)
        return cls(None, casts.cast_columns(plain, groups) if wgrad else None, plain)


class Products:
    """The three products of a weight [out, in], or of weights [groups, out, in] with groups of rows.

    Args:
        groups: how rows are shared out; None: one weight, all rows.
    """

    def __init__(self, kit: Kit, groups: Groups | None = None) -> None:
        self._kit, self._groups = kit, groups

    def forward(self, x: Tensor | Tiles, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """x [m, in] times the weight transposed: [m, out] of dtype."""
        if isinstance(x, Tiles):
            return self._multiply(x, self._kit.weights.blocks(weight), dtype)
        if self._groups is None:
            return product(x, weight.t(), dtype)
        out = x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)
        for block in self._blocks(x):
            block.lift(x[block.rows], weight, out[block.rows])
        return out

    def back(self, grad: Gradient, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The gradient [m, out] times the weight: [m, in] of dtype; the gradient's rows are dropped."""
        if grad.rows is not None:
            rows, grad.rows = grad.rows, None
            return self._multiply(rows, self._kit.weights.transposed(weight), dtype)
        assert grad.plain is not None, "a gradient without rows"
        if self._groups is None:
            return product(grad.plain, weight, dtype)
        d_x = grad.plain.new_empty(grad.plain.shape[0], weight.shape[2], dtype=dtype)
        for block in self._blocks(grad.plain):
            block.back(grad.plain[block.rows], weight, d_x[block.rows])
        return d_x

    def write(self, out: Tensor, grad: Gradient, x: Tiles | Tensor, accumulate: bool) -> None:
        """The gradient of the weight, written or added: x is Tiles [in, padded m], or values [m, in]."""
        groups, backend = self._groups, self._kit.choice.backend
        if isinstance(x, Tiles):
            assert grad.columns is not None, "a gradient without columns"
            if groups is None:
                gemm.multiply_into(out, grad.columns, x, accumulate, backend)
            else:
                gemm.weight_grad_groups(out, grad.columns, x, groups, accumulate, backend)
            return
        plain = grad.plain
        assert plain is not None, "a gradient without values"
        if groups is None:
            write_product(out, plain.t(), x, accumulate)
        else:
            blocks = self._blocks(plain)
            write_blocks(out, accumulate, blocks, lambda span: (plain[span], x[span]))

    def _multiply(self, left: Tiles, right: Blocks, dtype: torch.dtype) -> Tensor:
        backend = self._kit.choice.backend
        if self._groups is None:
            return gemm.multiply(left, right, dtype, backend)
        return gemm.multiply_groups(left, right, self._groups, dtype, backend)

    def _blocks(self, x: Tensor) -> list[Block]:
        assert self._groups is not None
        return blocks_of(self._groups.counts, x.device, grouped_gemm_serves(x))
