"""Products of groups as one dense product for each: for back ends, or sizes, without a grouped kernel."""

from collections.abc import Callable

from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles

# multiply_into(out, left, right, accumulate) of a back end.
MultiplyInto = Callable[[Tensor, Tiles, Blocks | Tiles, bool], None]


def multiply_each(
    multiply_into: MultiplyInto, out: Tensor, left: Tiles, right: Blocks, groups: Groups
) -> None:
    """Write rows of each group times its matrix into out [m, n]; left [m, k], right [g, n, k]."""
    start = 0
    for group, count in enumerate(groups.counts.tolist()):
        if count:
            rows = slice(start, start + count)
            part = Tiles(left.codes[rows], left.scales[rows])
            multiply_into(out[rows], part, Blocks(right.codes[group], right.scales[group]), False)
        start += count


def add_each(
    multiply_into: MultiplyInto, out: Tensor, left: Tiles, right: Tiles, groups: Groups, accumulate: bool
) -> None:
    """Write or add the sums over each group's tokens into out [g, n, k]; left [n, t], right [k, t]."""
    start = 0
    for group, count in enumerate(groups.padded_counts.tolist()):
        if count:
            tokens = slice(start, start + count)
            multiply_into(out[group], _tokens(left, tokens), _tokens(right, tokens), accumulate)
        elif not accumulate:
            out[group] = 0
        start += count


def _tokens(tiles: Tiles, tokens: slice) -> Tiles:
    """Some columns of tiles, from one multiple of 128 to another."""
    return Tiles(tiles.codes[:, tokens], tiles.scales[:, tokens.start // TILE : tokens.stop // TILE])
