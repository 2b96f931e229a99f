"""Casts that are worse on purpose, to show that the gate of `fp8_loss.py` can see them.

BlockGradients    gradients in 128 x 128 blocks, where the product wants 1 x 128 tiles. The report found
                  that a model of 16B diverges with them (Appendix B.2)
FixedScales       E4M3 with one scale for each kind of tensor, measured once, at the first cast of that
                  kind, and fixed from then on
"""

import torch
from torch import Tensor

from moe_runtime.fp8 import cast
from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles, num_tiles
from moe_runtime.model.ffn import gated, gated_backward

_MAX = 448.0


def _padded(x: Tensor, groups: Groups | None) -> Tensor:
    """x [m, k] with each group's rows begun at a multiple of 128, zeros between: [padded m, k]."""
    groups = Groups.one(x.shape[0], x.device) if groups is None else groups
    out = x.new_zeros(groups.num_padded, x.shape[1])
    start = padded = 0
    for count, room in zip(groups.counts.tolist(), groups.padded_counts.tolist(), strict=True):
        out[padded : padded + count] = x[start : start + count]
        start, padded = start + count, padded + room
    return out


def _unpadded(x: Tensor, groups: Groups | None, rows: int) -> Tensor:
    """The inverse of `_padded`."""
    if groups is None:
        return x[:rows]
    pieces = x.split(groups.padded_counts.tolist())
    return torch.cat([piece[:n] for piece, n in zip(pieces, groups.counts.tolist(), strict=True)])


def _as_tiles(blocks: Blocks) -> Tiles:
    """Blocks of a matrix as tiles that share scales."""
    rows = blocks.codes.shape[0]
    return Tiles(blocks.codes, blocks.scales.repeat_interleave(TILE, 0)[:rows].contiguous())


class _Composed:
    """The joined casts out of single ones; what is not given here is as in `fp8.cast`."""

    decode = staticmethod(cast.decode)

    def cast_rows(self, x: Tensor) -> Tiles:
        return cast.cast_rows(x)

    def cast_columns(self, x: Tensor, groups: Groups | None = None) -> Tiles:
        return cast.cast_columns(x, groups)

    def cast_both(self, x: Tensor, groups: Groups | None = None) -> tuple[Tiles, Tiles]:
        return cast.cast_both(x, groups)

    def columns_of(self, tiles: Tiles, groups: Groups | None = None) -> Tiles:
        return cast.columns_of(tiles, groups)

    @torch.no_grad()
    def cast_gated(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tiles:
        product = gated(gate_up.float())
        return self.cast_rows(product if row_weights is None else product * row_weights.unsqueeze(1))

    @torch.no_grad()
    def cast_gated_tiles(
        self, gate_up: Tiles, row_weights: Tensor | None = None, groups: Groups | None = None
    ) -> Tiles:
        product = gated(cast.decode(gate_up))
        return self.cast_columns(
            product if row_weights is None else product * row_weights.unsqueeze(1), groups
        )

    @torch.no_grad()
    def gated_backward_cast(
        self,
        d_product: Tensor,
        gate_up: Tiles,
        row_weights: Tensor | None = None,
        groups: Groups | None = None,
    ) -> tuple[Tiles, Tiles, Tensor | None]:
        lifted, pull, d_weights = cast.decode(gate_up), d_product.float(), None
        if row_weights is not None:
            d_weights = (pull * gated(lifted)).sum(dim=-1)
            pull = pull * row_weights.unsqueeze(1)
        d_lifted = torch.empty_like(lifted)
        gated_backward(pull, lifted, d_lifted)
        return *self.cast_both(d_lifted, groups), d_weights

    @torch.no_grad()
    def cast_normed(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tiles]:
        out, rstd, _ = cast.cast_normed(x, gain, eps)
        return out, rstd, self.cast_rows(out)


class BlockGradients(_Composed):
    """As `fp8.cast`, but gradients in 128 x 128 blocks; rows of several experts never share one."""

    @torch.no_grad()
    def cast_both(self, x: Tensor, groups: Groups | None = None) -> tuple[Tiles, Tiles]:
        blocks = cast.cast_weight(_padded(x, groups))
        tiles = _as_tiles(blocks)
        parts = (_unpadded(part, groups, x.shape[0]) for part in (tiles.codes, tiles.scales))
        return Tiles(*parts), _as_tiles(blocks.transposed())


class FixedScales(_Composed):
    """E4M3 under scales that the first tensor of each kind fixes: activations, weights, gradients.

    Args:
        scale: of all kinds; None: the first tensor of a kind says.
    """

    def __init__(self, scale: float | None = None) -> None:
        kinds = ("activation", "weight", "gradient")
        self._scales = {} if scale is None else dict.fromkeys(kinds, scale)

    def _scale_of(self, kind: str, x: Tensor) -> float:
        if kind not in self._scales:
            self._scales[kind] = 2.0 ** float(torch.ceil(torch.log2(x.float().abs().max() / _MAX)))
        return self._scales[kind]

    def _codes(self, kind: str, x: Tensor) -> tuple[Tensor, float]:
        scale = self._scale_of(kind, x) if x.numel() else 1.0
        held = (x.float() / scale).clamp(-_MAX, _MAX).to(torch.float8_e4m3fn)
        return held.view(torch.uint8), scale

    def _rows(self, kind: str, x: Tensor) -> Tiles:
        codes, scale = self._codes(kind, x)
        return Tiles(codes, torch.full((x.shape[0], num_tiles(x.shape[1])), scale, device=x.device))

    def _columns(self, kind: str, x: Tensor, groups: Groups | None) -> Tiles:
        return self._rows(kind, _padded(x, groups).t().contiguous())

    @torch.no_grad()
    def cast_rows(self, x: Tensor) -> Tiles:
        return self._rows("activation", x)

    @torch.no_grad()
    def cast_columns(self, x: Tensor, groups: Groups | None = None) -> Tiles:
        return self._columns("activation", x, groups)

    @torch.no_grad()
    def cast_both(self, x: Tensor, groups: Groups | None = None) -> tuple[Tiles, Tiles]:
        return self._rows("gradient", x), self._columns("gradient", x, groups)

    @torch.no_grad()
    def columns_of(self, tiles: Tiles, groups: Groups | None = None) -> Tiles:
        return self._columns("activation", cast.decode(tiles), groups)

    @torch.no_grad()
    def weight(self, x: Tensor) -> tuple[Blocks, Blocks]:
        """Blocks of a weight [..., out, in], and of its transposed."""
        codes, scale = self._codes("weight", x)
        shape = (*x.shape[:-2], num_tiles(x.shape[-2]), num_tiles(x.shape[-1]))
        blocks = Blocks(codes, torch.full(shape, scale, device=x.device))
        return blocks, blocks.transposed()
