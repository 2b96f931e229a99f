"""Each group's columns as a matrix of their own, all groups in one launch.

    codes    [rows x tokens]          | group 0 ........ | group 1 .... | group 2 ...
    result   one after another        [rows x tokens 0] [rows x tokens 1] [rows x tokens 2]

Groups begin at multiples of 128 tokens, so a tile of 128 lies in one group, and 128 bytes of a row stay
together. One copy for each group would do, but with 80 groups of 800 rows each is over before the host has
launched the next: 640 launches for a microbatch with two layers of experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_runtime.fp8.tiled import TILE

_WORD = torch.int64
_TILE_WORDS = TILE // _WORD.itemsize
ROWS, WARPS = 64, 4  # of a program


@triton.jit
def group_major_kernel(
    codes: tl.tensor,
    flat: tl.tensor,
    spans: tl.tensor,
    num_rows: int,
    row_words: int,
    ROWS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
) -> None:
    """One tile of ROWS rows; neighbours read neighbouring tiles."""
    tile = tl.program_id(0)
    start = tl.multiple_of(tl.load(spans + 2 * tile), TILE_WORDS).to(tl.int64)
    width = tl.multiple_of(tl.load(spans + 2 * tile + 1), TILE_WORDS).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = (row < num_rows)[:, None]
    wide = row.to(tl.int64)[:, None]
    word = tl.arange(0, TILE_WORDS)[None, :]
    first = tile.to(tl.int64) * TILE_WORDS
    values = tl.load(codes + wide * row_words + first + word, mask=is_row)
    tl.store(flat + start * num_rows + wide * width + (first - start) + word, values, mask=is_row)


def group_major_on_device(codes: Tensor, spans: Tensor) -> Tensor:
    """The codes of every group together.

    Args:
        codes: one byte each, [rows, tokens], contiguous; groups begin at multiples of 128 tokens.
        spans: int32 [tiles, 2]: where the group of each 128 tokens begins and how wide it is, in words of 8.

    Returns:
        The same bytes, [rows x tokens].
    """
    rows, tokens = codes.shape
    assert codes.is_contiguous() and codes.element_size() == 1 and tokens == TILE * len(spans), codes.shape
    flat = torch.empty(rows * tokens, dtype=codes.dtype, device=codes.device)
    if rows and tokens:
        sizes = {"ROWS": ROWS, "TILE_WORDS": _TILE_WORDS, "num_warps": WARPS}
        grid = (len(spans), triton.cdiv(rows, ROWS))
        words = codes.view(_WORD), flat.view(_WORD)
        group_major_kernel[grid](*words, spans, rows, tokens // _WORD.itemsize, **sizes)
    return flat
