"""DeepGEMM's grouped kernels on groups that begin anywhere.

Rows (`multiply_groups_into`). The library cuts the rows into tiles of 128 and gives each tile to one expert,
so a group has to begin at a multiple of 128. Padding all groups costs a copy of every code and, dearer, of
every result. Here rows stay where they lie: a tile goes to the group of its first row, which is right for
all but the first rows of the groups that begin inside of a tile. Those heads, at most 127 rows a group, are
copied to tiles of their own, multiplied again and written over what the first pass left there.
Rejected: a product for each group. It was 9% faster with 8 groups of 4,000 rows and up to 40% slower with 32
of 1,000, and each group is cut up by its own size, so that changing counts have kernels compiled for long.

    rows     | group 0 ........... | group 1 ....... | group 2 ...
    tiles    |   0   |   0   |   0   |   1   |   1   |   2   |        first pass
    heads                          |1 |              |2  |             second pass

Tokens (`weight_grad_groups`). The library wants each group's columns as a matrix of their own: one copy of
the codes, in words of 8 bytes, which is cheap beside the products (1 byte read and written for each, against
4 read and written for each element of the result), if one launch does it for all groups
(`group_major_triton.py`). Columns that the casts wrote so at once would save it.

Kernels are compiled for a way of cutting, not for a number of rows: counts may change at every step.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles

_TILES_RECIPE = (1, 1, 128)
_WORD = torch.int64


@dataclass(frozen=True)
class Cut:
    """What each pass does.

    Args:
        tile_groups: int32 [rows rounded up to 128] on the device: the group that a row's tile goes to.
        head_rows: int64 [heads x 128] on the device: rows to do again; a short head repeats its last row.
        head_groups: int32 [heads x 128] on the device: the group of each.
        tokens: int32 [groups] on the device: tokens of each group, rounded up to 128.
        spans: int32 [tiles, 2] on the device: for each 128 tokens where their group begins and how wide it
            is, in words of 8 tokens.
    """

    tile_groups: Tensor
    head_rows: Tensor
    head_groups: Tensor
    tokens: Tensor
    spans: Tensor


_cuts: WeakKeyDictionary[Groups, Cut] = WeakKeyDictionary()


def cut_of(groups: Groups) -> Cut:
    """The passes over the rows of groups, from counts on the CPU; kept for all products of the groups."""
    if groups not in _cuts:
        ends = groups.counts.cumsum(0)
        firsts = ends - groups.counts
        tiles = torch.arange(0, groups.num_rows, TILE)
        tile_groups = torch.searchsorted(ends, tiles, right=True)
        group = torch.nonzero((groups.counts > 0) & (firsts % TILE != 0)).flatten()
        first = firsts[group]
        size = torch.minimum(TILE - first % TILE, groups.counts[group])
        within = torch.minimum(torch.arange(TILE), size[:, None] - 1)
        made = (
            tile_groups.repeat_interleave(TILE).to(torch.int32),
            (first[:, None] + within).flatten(),
            group.repeat_interleave(TILE).to(torch.int32),
            groups.padded_counts.to(torch.int32),
            spans_of(groups.padded_counts).to(torch.int32),
        )
        _cuts[groups] = Cut(*(numbers.to(groups.device, non_blocking=True) for numbers in made))
    return _cuts[groups]


def spans_of(padded_counts: Tensor) -> Tensor:
    """int64 [tiles, 2]: begin and width of the group of each 128 tokens, in words of 8."""
    spans = torch.stack((padded_counts.cumsum(0) - padded_counts, padded_counts), dim=1)
    return spans.repeat_interleave(padded_counts // TILE, 0) // _WORD.itemsize


def multiply_rows(library: Any, out: Tensor, left: Tiles, right: Blocks, groups: Groups) -> None:
    """Write rows of each group times its matrix into out [m, n].

    Args:
        out: bfloat16, rows that begin at multiples of 16 bytes; m, n and k are not 0.
        left: [m, k], float8, scales with strides (1, m rounded up to 4).
        right: [g, n, k], float8.
    """
    cut = cut_of(groups)
    weights = (right.codes, right.scales)

    def product(target: Tensor, codes: Tensor, scales: Tensor, layout: Tensor) -> None:
        library.m_grouped_fp8_gemm_nt_contiguous((codes, scales), weights, target, layout, compiled_dims="")

    product(out, left.codes, left.scales, cut.tile_groups[: out.shape[0]])
    if cut.head_rows.numel():
        made = out.new_empty(cut.head_rows.numel(), out.shape[1])
        codes = words(left.codes).index_select(0, cut.head_rows).view(torch.float8_e4m3fn)
        scales = left.scales.t().index_select(1, cut.head_rows).t()
        product(made, codes, scales, cut.head_groups)
        words(out).index_copy_(0, cut.head_rows, words(made))


def add_tokens(library: Any, out: Tensor, left: Tiles, right: Tiles, groups: Groups) -> None:
    """Add the sums over each group's tokens to out [g, n, k].

    Args:
        out: float32, contiguous.
        left, right: [n, t] and [k, t], float8, scales with strides (1, rows rounded up to 4).
    """
    cut, counts = cut_of(groups), groups.padded_counts.tolist()
    left_codes, right_codes = _group_major(left.codes, groups), _group_major(right.codes, groups)
    whole = [(0, len(counts))]
    for first, last in whole if _takes_empty_groups(out) else runs_of_filled(counts):
        begin, end = sum(counts[:first]), sum(counts[:last])
        tiles = slice(begin // TILE, end // TILE)
        sums = out[first:last]
        library.k_grouped_fp8_gemm_nt_contiguous(
            (left_codes[len(left.codes) * begin : len(left.codes) * end], left.scales[:, tiles]),
            (right_codes[len(right.codes) * begin : len(right.codes) * end], right.scales[:, tiles]),
            sums,
            counts[first:last],
            cut.tokens[first:last],
            c=sums,
            recipe=_TILES_RECIPE,
        )


def _takes_empty_groups(out: Tensor) -> bool:
    """Whether the kernel for sums [g, n, k] passes over groups without tokens.

    Seen with 0.1.5 on an H200: with 520 x 264 it fails at launch, with multiples of the tile it does not.
    """
    return all(size % TILE == 0 for size in out.shape[1:])


def runs_of_filled(counts: list[int]) -> list[tuple[int, int]]:
    """First and end of each run of groups that all have tokens."""
    borders = [-1, *(group for group, count in enumerate(counts) if count == 0), len(counts)]
    return [(before + 1, after) for before, after in pairwise(borders) if after - before > 1]


def _group_major(codes: Tensor, groups: Groups) -> Tensor:
    """As `group_major`, on a GPU by one kernel."""
    if not codes.is_cuda or codes.shape[1] in groups.padded_counts:
        return group_major(codes, groups.padded_counts.tolist())
    from moe_runtime.fp8.group_major_triton import group_major_on_device  # brings triton

    return group_major_on_device(codes.contiguous(), cut_of(groups).spans)


def group_major(codes: Tensor, counts: list[int]) -> Tensor:
    """[rows x tokens]: the codes [rows, tokens] with each group's tokens as a matrix of their own."""
    if codes.shape[1] in counts:
        return codes.contiguous().view(-1)
    columns = words(codes)
    flat = columns.new_empty(columns.numel())
    start, rows, unit = 0, len(columns), codes.shape[1] // columns.shape[1]
    for count in counts:
        end = start + count // unit
        flat[rows * start : rows * end].view(rows, end - start).copy_(columns[:, start:end])
        start = end
    return flat.view(codes.dtype)


def words(matrix: Tensor) -> Tensor:
    """The same bytes in words of 8 where rows allow it, for copies that are faster so."""
    size = matrix.element_size()
    places = (matrix.shape[-1], matrix.stride(0), matrix.storage_offset())
    if matrix.stride(-1) == 1 and all(place * size % _WORD.itemsize == 0 for place in places):
        return matrix.view(_WORD)
    return matrix.view(torch.uint8) if size == 1 else matrix
