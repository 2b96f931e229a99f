"""Products to measure: shapes of DeepSeek-V3, and what each back end and BF16 have to do for them.

A case makes random BF16 operands, quantises them with plain torch operations (so that products are judged
apart from the casts), and gives calls that write the same result: one for BF16 and one for each back end.
There are several sets of operands, together larger than L2, that the calls go through in turn.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles, num_tiles

_SETS_BYTES = 1 << 28  # of operands in all; L2 holds 50 to 60 MB
_MAX_SETS = 4
_MAX_E4M3 = 448.0


@dataclass(frozen=True)
class Shape:
    """A product.

    Args:
        role: `dense` (Fprop or Dgrad), `wgrad`, `groups`, `wgrad_groups`.
        m, n, k: rows and columns of the result, length of the sum; tokens are m (dense, groups) or k.
        counts: tokens of each group; empty: one group.
    """

    role: str
    m: int
    n: int
    k: int
    counts: tuple[int, ...] = ()

    @property
    def flops(self) -> int:
        """Multiplications and additions, of real tokens."""
        return 2 * self.m * self.n * self.k

    @property
    def name(self) -> str:
        groups = f" {len(self.counts)} groups" if self.counts else ""
        return f"{self.role} {self.m} x {self.n} x {self.k}{groups}"


@dataclass(frozen=True)
class Operands:
    """One set of operands, in BF16 and quantised; out is what FP8 writes, plain_out what BF16 writes."""

    left: Tensor
    right: Tensor
    left_tiles: Tiles
    right_tiles: Tiles | Blocks
    out: Tensor
    plain_out: Tensor


def tiles_of(x: Tensor) -> Tiles:
    """Tiles [m, k] of x [m, k] with power-of-two scales, transposed as kernels write them."""
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x, (0, -columns % TILE)).view(rows, num_tiles(columns), TILE).float()
    scales = _power_of_two(padded.abs().amax(-1))
    codes = (padded / scales.unsqueeze(-1)).to(torch.float8_e4m3fn).view(torch.uint8).flatten(1)
    wide = scales.new_ones(scales.shape[1], -(-rows // 4) * 4)
    wide[:, :rows] = scales.t()
    return Tiles(codes[:, :columns].contiguous(), wide[:, :rows].t())


def blocks_of(w: Tensor) -> Blocks:
    """Blocks [..., n, k] of w [..., n, k] with power-of-two scales."""
    *front, rows, columns = w.shape
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    scales = torch.empty(*front, num_tiles(rows), num_tiles(columns), device=w.device)
    count = math.prod(front)
    matrices, all_codes, all_scales = (x.view(count, *x.shape[-2:]) for x in (w.contiguous(), codes, scales))
    for index in range(count if w.numel() else 0):
        padded = torch.nn.functional.pad(matrices[index], (0, -columns % TILE, 0, -rows % TILE)).float()
        blocks = padded.view(num_tiles(rows), TILE, num_tiles(columns), TILE)
        scale = _power_of_two(blocks.abs().amax((1, 3)))
        values = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns]
        all_codes[index] = values.to(torch.float8_e4m3fn).view(torch.uint8)
        all_scales[index] = scale
    return Blocks(codes, scales)


def _power_of_two(amax: Tensor) -> Tensor:
    """The smallest power of two that brings amax to 448 or less."""
    return torch.exp2(torch.ceil(torch.log2(amax.clamp_min(1e-30) / _MAX_E4M3)))


def groups_of(shape: Shape, device: torch.device) -> Groups:
    return Groups(torch.tensor(shape.counts, dtype=torch.int64), device)


def make_operands(shape: Shape, device: torch.device, seed: int) -> Operands:
    """Random operands. For sums over tokens: BF16 [tokens, features], FP8 [features, padded tokens]."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device).bfloat16()

    front = (len(shape.counts),) if shape.counts else ()
    if "wgrad" not in shape.role:
        left, right = (
            draw(shape.m, shape.k),
            draw(*([len(shape.counts)] if shape.counts else []), shape.n, shape.k),
        )
        out, plain = (torch.empty(shape.m, shape.n, dtype=torch.bfloat16, device=device) for _ in range(2))
        return Operands(left, right, tiles_of(left), blocks_of(right), out, plain)
    left, right = draw(shape.k, shape.m), draw(shape.k, shape.n)
    size = (*front, shape.m, shape.n)
    columns = [tiles_of(_padded_columns(x, shape, device)) for x in (left, right)]
    out = torch.empty(size, dtype=torch.float32, device=device)
    return Operands(left, right, columns[0], columns[1], out, torch.empty_like(out, dtype=torch.bfloat16))


def _padded_columns(x: Tensor, shape: Shape, device: torch.device) -> Tensor:
    """[features, padded tokens] of x [tokens, features]."""
    if not shape.counts:
        return x.t().contiguous()
    groups = groups_of(shape, device)
    wide = x.new_zeros(x.shape[1], groups.num_padded)
    start = padded_start = 0
    for count, padded in zip(shape.counts, groups.padded_counts.tolist(), strict=True):
        wide[:, padded_start : padded_start + count] = x[start : start + count].t()
        start, padded_start = start + count, padded_start + padded
    return wide


def sets_of(shape: Shape, device: torch.device) -> list[Operands]:
    """As many sets as exceed L2."""
    first = make_operands(shape, device, 0)
    size = first.left_tiles.nbytes + first.right_tiles.nbytes
    wanted = min(_MAX_SETS, max(1, _SETS_BYTES // size))
    return [first, *(make_operands(shape, device, seed) for seed in range(1, wanted))]


def plain_call(shape: Shape, groups: Groups | None, x: Operands) -> Callable[[], Any]:
    """The same product in BF16, as PyTorch has it. Weight gradients: into BF16, nothing is added."""
    if shape.role == "dense":
        return lambda: torch.mm(x.left, x.right.t(), out=x.plain_out)
    if shape.role == "wgrad":
        return lambda: torch.mm(x.left.t(), x.right, out=x.plain_out)
    assert groups is not None
    ends = groups.ends
    if shape.role == "groups":
        return lambda: torch._grouped_mm(x.left, x.right.transpose(-2, -1), offs=ends)
    return lambda: torch._grouped_mm(x.left.t(), x.right, offs=ends)


def fp8_call(
    shape: Shape, groups: Groups | None, x: Operands, module: Any, accumulate: bool, **options: Any
) -> Callable[[], Any]:
    """The product by a back end's module, into x.out; weight gradients may add to it."""
    if groups is None:
        return lambda: module.multiply_into(x.out, x.left_tiles, x.right_tiles, accumulate, **options)
    if shape.role == "groups":
        return lambda: module.multiply_groups_into(x.out, x.left_tiles, x.right_tiles, groups, **options)
    return lambda: module.weight_grad_groups(
        x.out, x.left_tiles, x.right_tiles, groups, accumulate, **options
    )


def ragged(groups: int, mean: int, seed: int = 0) -> tuple[int, ...]:
    """Counts about a mean, 30% up or down."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(groups, generator=generator) * 0.6 + 0.7
    return tuple(int(count) for count in spread * mean)


WIDTHS = (  # (n, k) of the dense products of DeepSeek-V3
    (4096, 7168),
    (7168, 2048),
    (7168, 16384),
    (24576, 1536),
    (7168, 18432),
    (36864, 7168),
    (2112, 7168),
    (32768, 512),
)
SQUARES = (4096, 8192)


LONG = 3  # of these also at twice the tokens


def gpu_shapes() -> list[Shape]:
    """Dense shapes of V3 at 4,096 tokens and some at 8,192, three products of each, and grouped ones."""
    shapes = [Shape("dense", side, side, side) for side in SQUARES]
    for tokens, widths in ((4096, WIDTHS), (8192, WIDTHS[:LONG])):
        for n, k in widths:
            shapes.append(Shape("dense", tokens, n, k))
            shapes.append(Shape("dense", tokens, k, n))  # Dgrad
            shapes.append(Shape("wgrad", n, k, tokens))
    shapes.append(Shape("wgrad", 4096, 4096, 4096))
    for counts in ((4096,) * 8, ragged(8, 4096), (1024,) * 32, ragged(32, 1024)):
        tokens = sum(counts)
        for n, k in ((4096, 7168), (7168, 2048)):
            shapes.append(Shape("groups", tokens, n, k, counts))
            shapes.append(Shape("groups", tokens, k, n, counts))
            shapes.append(Shape("wgrad_groups", n, k, tokens, counts))
    return shapes
