"""What the Triton kernel of FP8 products must do, run by Triton's interpreter on CPU tensors.

Triton reads TRITON_INTERPRET when a kernel is defined, so this runs in a process of its own:
`python -m tests.unit.fp8.gemm_interpreted` runs each `case_` and prints {name: what went wrong or ""}.
"""

import json
import sys
import traceback

import torch

from moe_runtime.cli.bench_fp8.cases import Shape, groups_of, make_operands
from moe_runtime.fp8 import gemm_reference, gemm_triton
from moe_runtime.fp8.gemm_triton import Plan
from moe_runtime.fp8.tiled import Groups, Tiles
from tests.unit.interpreted import let_sizes_be_loop_bounds

CPU = torch.device("cpu")
SMALL = Plan(64, 64, 4, 3, band=2)
LARGE = Plan(128, 128, 4, 4)
# The interpreter's time goes by programs: written with one plan, added to with the other.
ACCUMULATING = ((SMALL, False), (LARGE, True))
COUNTS = [(70, 0, 5, 129), (0, 0, 0), (0, 200, 0), (128, 256), (1,)]


def _poisoned(like: torch.Tensor, seed: int = 3) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def _close(ours: torch.Tensor, reference: torch.Tensor, terms: int = 512) -> None:
    """Equal up to the order in which FP32 sums are formed."""
    scale = float(reference.abs().max()) if reference.numel() else 1.0
    assert not ours.isnan().any()
    assert torch.allclose(ours, reference, rtol=0.0, atol=scale * terms * 2.0**-24)


def _dense(role: str, m: int, n: int, k: int) -> None:
    x = make_operands(Shape(role, m, n, k), CPU, 1)
    for plan, accumulate in ACCUMULATING:
        ours = _poisoned(x.out.float())
        reference = ours.clone()
        if not accumulate:
            ours.fill_(torch.nan)
        gemm_triton.multiply_into(ours, x.left_tiles, x.right_tiles, accumulate, plan)
        gemm_reference.multiply_into(reference, x.left_tiles, x.right_tiles, accumulate)
        _close(ours, reference)


def case_dense_products_of_any_size() -> None:
    for m, n, k in ((70, 130, 300), (129, 64, 128), (3, 5, 40), (256, 384, 16), (1, 1, 1)):
        for role in ("dense", "wgrad"):
            _dense(role, m, n, k)


def case_nothing_to_do() -> None:
    for m, n, k in ((0, 5, 128), (4, 0, 128)):
        _dense("dense", m, n, k)
    x = make_operands(Shape("dense", 4, 5, 128), CPU, 1)
    empty = Tiles(x.left_tiles.codes[:, :0], x.left_tiles.scales[:, :0])
    out = torch.ones(4, 4)
    gemm_triton.multiply_into(out, empty, empty, True, SMALL)
    assert torch.equal(out, torch.ones(4, 4))
    gemm_triton.multiply_into(out, empty, empty, False, SMALL)
    assert torch.equal(out, torch.zeros(4, 4))


def case_rows_of_groups() -> None:
    for counts in COUNTS:
        shape = Shape("groups", sum(counts), 130, 300, counts)
        x = make_operands(shape, CPU, 2)
        for plan in (SMALL, LARGE):
            groups = groups_of(shape, CPU)
            ours = torch.full(x.out.shape, torch.nan)
            reference = ours.clone()
            gemm_triton.multiply_groups_into(ours, x.left_tiles, x.right_tiles, groups, plan)
            gemm_reference.multiply_groups_into(reference, x.left_tiles, x.right_tiles, groups)
            _close(ours, reference)


def case_tokens_of_groups() -> None:
    for counts in COUNTS:
        shape = Shape("wgrad_groups", 70, 130, sum(counts), counts)
        x = make_operands(shape, CPU, 2)
        groups = groups_of(shape, CPU)
        for plan, accumulate in ACCUMULATING:
            ours = _poisoned(x.out)
            reference = ours.clone()
            if not accumulate:
                ours.fill_(torch.nan)
            gemm_triton.weight_grad_groups(ours, x.left_tiles, x.right_tiles, groups, accumulate, plan)
            gemm_reference.weight_grad_groups(reference, x.left_tiles, x.right_tiles, groups, accumulate)
            _close(ours, reference)


def case_places_are_those_of_a_loop() -> None:
    for counts in COUNTS:
        wanted, start = [], 0
        for group, count in enumerate(counts):
            wanted += [[group, first, start + count] for first in range(start, start + count, 64)]
            start += count
        groups = Groups(torch.tensor(counts), CPU)
        assert gemm_triton.row_places(groups, 64).tolist() == wanted
        assert gemm_triton.row_places(groups, 64) is gemm_triton.row_places(groups, 64)


def case_views_are_read_and_written_where_they_lie() -> None:
    x = make_operands(Shape("dense", 96, 130, 304), CPU, 4)
    left = Tiles(x.left_tiles.codes[16:80], x.left_tiles.scales[16:80])
    record = torch.full((64, 200), 7.0)
    gemm_triton.multiply_into(record[:, 8:138], left, x.right_tiles, False, SMALL)
    reference = torch.empty(64, 130)
    gemm_reference.multiply_into(reference, left, x.right_tiles, False)
    _close(record[:, 8:138], reference)
    assert bool((record[:, :8] == 7).all()) and bool((record[:, 138:] == 7).all())


def case_a_wrong_scale_is_seen() -> None:
    """The planted fault: one scale of 18 twice as large must not pass."""
    x = make_operands(Shape("dense", 70, 130, 300), CPU, 1)
    ours, reference = torch.empty(70, 130), torch.empty(70, 130)
    gemm_reference.multiply_into(reference, x.left_tiles, x.right_tiles, False)
    x.right_tiles.scales[1, 2] *= 2
    gemm_triton.multiply_into(ours, x.left_tiles, x.right_tiles, False, SMALL)
    try:
        _close(ours, reference)
    except AssertionError:
        return
    raise AssertionError("a doubled scale passed")


def main() -> None:
    let_sizes_be_loop_bounds()
    results = {}
    for name, case in sorted(globals().items()):
        if name.startswith("case_"):
            try:
                case()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
