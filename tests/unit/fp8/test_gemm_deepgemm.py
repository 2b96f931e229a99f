"""What is handed to DeepGEMM, against a stand-in that computes as its kernels do (sm_90), on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_runtime.cli.bench_fp8.cases import Shape, groups_of, make_operands
from moe_runtime.fp8 import gemm_deepgemm, gemm_reference
from moe_runtime.fp8.gemm_deepgemm_groups import cut_of
from moe_runtime.fp8.tiled import TILE, Blocks, Groups, Tiles

CPU = torch.device("cpu")
COUNTS = [
    (70, 0, 5, 129),
    (0, 0, 0),
    (0, 200, 0),
    (128, 256),
    (1,),
    (1, 2, 3, 4, 120, 300),
    (130, 126, 0, 1),
]


def plain(codes: Tensor) -> Tensor:
    assert codes.dtype == torch.float8_e4m3fn and codes.is_contiguous() and codes.shape[-1] % 16 == 0
    return codes.view(torch.uint8)


def tiles(codes: Tensor, scales: Tensor) -> Tiles:
    rows = len(codes)
    assert scales.stride() == (1, -(-rows // 4) * 4)
    return Tiles(plain(codes), scales)


class Library:
    """Tiles of 128 rows, each with the group of its first row; columns of groups one after the other."""

    def __init__(self) -> None:
        self.rows = 0

    def get_mk_alignment_for_contiguous_layout(self) -> int:
        return TILE

    def fp8_gemm_nt(self, a: Any, b: Any, d: Tensor, c: Tensor | None = None, recipe: Any = None) -> None:
        if c is None:
            assert d.dtype == torch.bfloat16 and d.stride(0) * 2 % 16 == 0 and d.shape[1] % 8 == 0
            gemm_reference.multiply_into(d, tiles(*a), Blocks(plain(b[0]), b[1]), False)
        else:
            assert c is d and d.dtype == torch.float32 and recipe == (1, 1, 128) and d.stride(0) % 4 == 0
            gemm_reference.multiply_into(d, tiles(*a), tiles(*b), True)

    def m_grouped_fp8_gemm_nt_contiguous(
        self, a: Any, b: Any, d: Tensor, layout: Tensor, compiled_dims: str
    ) -> None:
        left = tiles(*a)
        assert compiled_dims == "" and layout.dtype == torch.int32 and len(layout) == len(d) == len(a[0])
        assert d.dtype == torch.bfloat16 and d.stride(0) * 2 % 16 == 0 and d.shape[1] % 8 == 0
        for start in range(0, len(d), TILE):
            rows, group = slice(start, start + TILE), int(layout[start])
            part = Tiles(left.codes[rows], left.scales[rows])
            gemm_reference.multiply_into(d[rows], part, Blocks(plain(b[0])[group], b[1][group]), False)
        self.rows += len(d)

    def k_grouped_fp8_gemm_nt_contiguous(
        self, a: Any, b: Any, d: Tensor, counts: list[int], sizes: Tensor, c: Tensor, recipe: Any
    ) -> None:
        assert (
            c is d
            and recipe == (1, 1, 128)
            and d.shape[-1] % 4 == 0
            and counts == sizes.tolist()
            and sizes.dtype == torch.int32
        )
        # What the library dies of on a GPU: an empty group, and a result that is not of whole tiles.
        assert min(counts) > 0 or all(size % TILE == 0 for size in d.shape[1:])
        start = 0
        for out, count in zip(d, counts, strict=True):
            sides = []
            for codes, scales in (a, b):
                rows = len(scales)
                flat = plain(codes)[rows * start : rows * (start + count)].view(rows, count)
                sides.append(Tiles(flat, scales[:, start // TILE : (start + count) // TILE]))
            gemm_reference.multiply_into(out, *sides, True)
            start += count


def _close(ours: Tensor, reference: Tensor) -> None:
    """Equal up to the order of FP32 sums and, in BF16, two roundings."""
    scale = float(reference.abs().max()) if reference.numel() else 1.0
    unit = 2.0**-7 if ours.dtype == torch.bfloat16 else 2.0**-15
    assert torch.allclose(ours.float(), reference.float(), rtol=0.0, atol=scale * unit)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(gemm_deepgemm, "_library", lambda: made)
    return made


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(136, 304), (130, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_of_groups_that_begin_anywhere(
    library: Library, counts: tuple[int, ...], columns: int, depth: int, dtype: torch.dtype
) -> None:
    shape = Shape("groups", sum(counts), columns, depth, counts)
    x = make_operands(shape, CPU, 2)
    groups = groups_of(shape, CPU)
    ours = torch.full(x.out.shape, torch.nan, dtype=dtype)
    reference = ours.clone()
    gemm_deepgemm.multiply_groups_into(ours, x.left_tiles, x.right_tiles, groups)  # type: ignore[arg-type]
    gemm_reference.multiply_groups_into(reference, x.left_tiles, x.right_tiles, groups)  # type: ignore[arg-type]
    _close(ours, reference)
    if dtype == torch.bfloat16 and columns % 8 == 0:
        begun = sum(count > 0 for count in counts)
        assert library.rows <= sum(counts) + max(0, begun - 1) * TILE


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(70, 132), (70, 130), (128, 256)])
def test_tokens_of_groups(
    library: Library, counts: tuple[int, ...], dtype: torch.dtype, accumulate: bool, rows: int, columns: int
) -> None:
    shape = Shape("wgrad_groups", rows, columns, sum(counts), counts)
    x = make_operands(shape, CPU, 2)
    groups = groups_of(shape, CPU)
    ours = torch.randn(x.out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    reference = ours.clone()
    if not accumulate:
        ours.fill_(torch.nan)
    gemm_deepgemm.weight_grad_groups(ours, x.left_tiles, x.right_tiles, groups, accumulate)  # type: ignore[arg-type]
    gemm_reference.weight_grad_groups(reference, x.left_tiles, x.right_tiles, groups, accumulate)  # type: ignore[arg-type]
    _close(ours, reference)


@pytest.mark.parametrize("role", ["dense", "wgrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("accumulate", [False, True])
def test_dense_products_of_any_size(
    library: Library, role: str, dtype: torch.dtype, accumulate: bool
) -> None:
    for m, n, k in ((70, 130, 300), (4, 136, 128), (1, 1, 1), (0, 8, 128), (3, 8, 0)):
        x = make_operands(Shape(role, m, n, k), CPU, 2)
        ours = torch.randn(m, n, generator=torch.Generator().manual_seed(1)).to(dtype)
        reference = ours.clone()
        if not accumulate:
            ours.fill_(torch.nan)
        gemm_deepgemm.multiply_into(ours, x.left_tiles, x.right_tiles, accumulate)
        gemm_reference.multiply_into(reference, x.left_tiles, x.right_tiles, accumulate)
        _close(ours, reference)


def test_heads_are_the_rows_that_the_first_pass_gives_to_another_group() -> None:
    for counts in COUNTS:
        groups = Groups(torch.tensor(counts), CPU)
        cut = cut_of(groups)
        owner = torch.arange(len(counts)).repeat_interleave(groups.counts)
        wrong = torch.nonzero(cut.tile_groups[: groups.num_rows] != owner).flatten()
        assert sorted(set(cut.head_rows.tolist())) == wrong.tolist()
        assert torch.equal(owner[cut.head_rows].int(), cut.head_groups)
        assert len(cut.tile_groups) % TILE == 0 and cut_of(groups) is cut


def test_without_the_heads_the_check_fails(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted fault: what the first pass leaves must not pass."""
    from moe_runtime.fp8 import gemm_deepgemm_groups

    def headless(groups: Groups) -> Any:
        cut = cut_of(groups)
        return SimpleNamespace(tile_groups=cut.tile_groups, head_rows=cut.head_rows[:0])

    monkeypatch.setattr(gemm_deepgemm_groups, "cut_of", headless)
    with pytest.raises(AssertionError):
        test_rows_of_groups_that_begin_anywhere(library, (70, 58, 5), 136, 304, torch.bfloat16)
