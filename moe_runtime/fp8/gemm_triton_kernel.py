"""The Triton kernel of all FP8 products: three roles, one loop.

    DENSE    out[m, n]     = sum_k left[m, k] right[n, k]
    ROWS     out[m, n]     = the same; rows of group i with right[i], rows of a group anywhere
    TOKENS   out[i][m, n]  = the same; k over the tokens of group i, a run of whole tiles of 128

Why it is built so. Hopper's FP8 units add with about 14 bits, so after 128 products (four instructions of
32) the partial sum leaves them, is multiplied by its scales and added in FP32. Those additions are a
quarter of the time of the products themselves, done by other units: they are free only while something else
multiplies. Here that is another program: tiles are small (64 x 128, 4 warps), so that two or three programs
share a multiprocessor and one adds while another multiplies.

The scale of a 128 x 128 block is one number for a whole tile of 128 columns, so with `Blocks` on the right
the factor of a row is left scale x block scale, one product a row. With `Tiles` on the right (weight
gradients) each column has its own, one product more for each element.

Tiles are taken in bands of `BAND` rows of tiles, columns first within a band, so that what runs together
shares operands in L2. Programs are persistent: each takes every n-th tile.

Rejected: warp groups of their own for loading and multiplying (`warp_specialize` of Triton 3.6 compiles this
loop for Hopper, and every product comes out wrong), one accumulator promoted while the next product runs (the
compiler waits for a product before it goes on, whatever uses it), scales of a column tile wider than 128 (two
factors a row), an accumulator of 128 x 256 (with the partial sum it needs more registers than there are),
rows of groups padded to whole tiles (a copy of all rows).
"""

import triton
import triton.language as tl

DENSE = tl.constexpr(0)
ROWS = tl.constexpr(1)
TOKENS = tl.constexpr(2)
TILE = tl.constexpr(128)


@triton.jit
def place_of(
    tile: int,
    places: tl.tensor,
    num_rows: int,
    depth: int,
    row_tiles: int,
    column_tiles: int,
    ROLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BAND: tl.constexpr,
) -> tuple[int, int, int, int, int, int]:
    """Group, first row, end of rows, column tile, first step and end of steps of a tile of the result."""
    group = 0
    first_step = 0
    end_step = tl.cdiv(depth, TILE)
    if ROLE == TOKENS:
        group = tile // (row_tiles * column_tiles)
        tile = tile % (row_tiles * column_tiles)
        first_step = tl.load(places + group - 1, mask=group > 0, other=0) // TILE
        end_step = tl.load(places + group) // TILE
    band = tile // (BAND * column_tiles)
    within_band = tile % (BAND * column_tiles)
    height = tl.minimum(row_tiles - band * BAND, BAND)
    row_tile = band * BAND + within_band % height
    first_row = row_tile * BLOCK_M
    end_row = num_rows
    if ROLE == ROWS:
        group = tl.load(places + row_tile * 3)
        first_row = tl.load(places + row_tile * 3 + 1)
        end_row = tl.load(places + row_tile * 3 + 2)
    return group, first_row, end_row, within_band // height, first_step, end_step


@triton.jit
def right_scale_of(places: tl.tensor, column_is_ours: tl.tensor, PER_ROW: tl.constexpr) -> tl.tensor:
    """The scale of the block, or of each column of the tile."""
    if PER_ROW:
        return tl.load(places, mask=column_is_ours, other=0.0)
    else:  # noqa: RET505 -- one branch is compiled, and only a whole if-else says so
        return tl.load(places)


@triton.jit
def promoted(
    total: tl.tensor,
    part: tl.tensor,
    left_scale: tl.tensor,
    right_scale: tl.tensor,
    PER_ROW: tl.constexpr,
) -> tl.tensor:
    """total + part x its scales, all [BLOCK_M, BLOCK_N] in FP32."""
    if PER_ROW:
        scaled = part * left_scale[:, None] * right_scale[None, :]
    else:
        scaled = part * (left_scale * right_scale)[:, None]
    return total + scaled


@triton.jit
def write_tile(
    targets: tl.tensor, total: tl.tensor, row_is_ours: tl.tensor, column_is_ours: tl.tensor, ADD: tl.constexpr
) -> None:
    """Write or add a tile, rounded once."""
    is_ours = row_is_ours[:, None] & column_is_ours[None, :]
    if ADD:
        total += tl.load(targets, mask=is_ours, other=0.0).to(tl.float32)
    tl.store(targets, total.to(targets.dtype.element_ty), mask=is_ours)


# Sizes whose alignment says nothing to the compiler; else each would be compiled twice.
_ANY_ALIGNMENT = (
    "left_scale_tile",
    "right_rows",
    "right_scale_group",
    "right_scale_row",
    "num_rows",
    "depth",
    "row_tiles",
    "num_tiles",
)


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)  # type: ignore[untyped-decorator]
def product_kernel(
    left: tl.tensor,
    left_stride: int,
    left_scales: tl.tensor,
    left_scale_row: int,
    left_scale_tile: int,
    right: tl.tensor,
    right_stride: int,
    right_rows: int,
    right_scales: tl.tensor,
    right_scale_group: int,
    right_scale_row: int,
    right_scale_tile: int,
    out: tl.tensor,
    out_group: int,
    out_stride: int,
    places: tl.tensor,
    num_rows: int,
    num_columns: int,
    depth: int,
    row_tiles: int,
    num_tiles: int,
    ROLE: tl.constexpr,
    RIGHT_PER_ROW: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BAND: tl.constexpr,
) -> None:
    """Write or add the product; `gemm_triton` says what the arguments are."""
    left_tiles = tl.make_tensor_descriptor(left, [num_rows, depth], [left_stride, 1], [BLOCK_M, TILE])
    right_tiles = tl.make_tensor_descriptor(right, [right_rows, depth], [right_stride, 1], [BLOCK_N, TILE])
    column_tiles = tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        group, first_row, end_row, column_tile, first_step, end_step = place_of(
            tile, places, num_rows, depth, row_tiles, column_tiles, ROLE, BLOCK_M, BAND
        )
        right_row = column_tile * BLOCK_N + (group * num_columns if ROLE == ROWS else 0)
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        left_places = left_scales + rows * left_scale_row
        right_places = right_scales + tl.cast(group, tl.int64) * right_scale_group
        if RIGHT_PER_ROW:
            right_places += columns * right_scale_row
        else:
            right_places += column_tile * BLOCK_N // TILE * right_scale_row
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(first_step, end_step):
            left_codes = left_tiles.load([first_row, step * TILE])
            right_codes = right_tiles.load([right_row, step * TILE])
            left_scale = tl.load(left_places + step * left_scale_tile, mask=rows < end_row, other=0.0)
            right_scale = right_scale_of(
                right_places + step * right_scale_tile, columns < num_columns, RIGHT_PER_ROW
            )
            part = tl.dot(left_codes, right_codes.T)
            total = promoted(total, part, left_scale, right_scale, RIGHT_PER_ROW)
        targets = out + tl.cast(group, tl.int64) * out_group + columns[None, :]
        targets += rows.to(tl.int64)[:, None] * out_stride
        write_tile(targets, total, rows < end_row, columns < num_columns, ACCUMULATE)
