"""What the casts' kernels must do, run by Triton's interpreter on CPU tensors against the CPU forms.

Triton reads TRITON_INTERPRET once, when a kernel is defined, so these run in a process of their own:
`python -m tests.unit.fp8.cast_cases` runs each function that starts with `case_` and prints
{name: what went wrong, or ""} as JSON. `test_casts_interpreted.py` starts it and reports each as a test.
"""

import json
import math
import sys
import traceback
import warnings
from typing import Any

import torch
from torch import Tensor

from moe_runtime.fp8 import cast, cast_triton
from moe_runtime.fp8.gemm_deepgemm_groups import group_major, spans_of
from moe_runtime.fp8.group_major_triton import group_major_on_device
from moe_runtime.fp8.tiled import Blocks, Groups, Tiles
from tests.unit.comm.wire_values import heavy_tailed, on_ties, random_bits, same_bits, special_tiles

CPU = torch.device("cpu")


def same(ours: Tiles | Blocks, theirs: Tiles | Blocks) -> bool:
    return torch.equal(ours.codes, theirs.codes) and same_bits(
        ours.scales.contiguous(), theirs.scales.contiguous()
    )


def ragged() -> list[tuple[Tensor, Groups | None]]:
    """Matrices and groups of their rows: sizes that are no multiple of anything, groups of all kinds."""
    with_specials = torch.cat([special_tiles(70), heavy_tailed(115, 70, seed=1)])
    return [
        (heavy_tailed(135, 130, seed=2), Groups(torch.tensor([0, 5, 128, 0, 2]), CPU)),
        (with_specials, Groups(torch.tensor([130]), CPU)),
        (random_bits(20, 72, seed=3), None),
        (on_ties(128).t().contiguous(), Groups(torch.tensor([0, 128]), CPU)),
        (heavy_tailed(3, 1, seed=4), Groups(torch.tensor([1, 2]), CPU)),
        (torch.empty(0, 40), Groups(torch.tensor([0, 0]), CPU)),
    ]


def case_rows_are_those_of_the_cpu_form() -> None:
    for x, _ in ragged():
        assert same(cast_triton.cast_rows_on_device(x), cast.cast_rows(x))
        assert same(cast_triton.cast_rows_on_device(x, "fp32"), cast.cast_rows(x, "fp32"))
    for dtype in (torch.bfloat16, torch.float64):
        x = heavy_tailed(40, 130, seed=2).to(dtype)
        assert same(cast_triton.cast_rows_on_device(x), cast.cast_rows(x))
    strided = heavy_tailed(9, 400, seed=5)[::2, 3:303]
    assert same(cast_triton.cast_rows_on_device(strided), cast.cast_rows(strided))


def case_scales_lie_as_matrix_units_read_them() -> None:
    scales = cast_triton.cast_rows_on_device(torch.ones(6, 300)).scales
    assert scales.shape == (6, 3) and scales.stride() == (1, 8)


def case_columns_are_those_of_the_cpu_form_and_gaps_are_zero() -> None:
    for x, groups in ragged():
        assert same(cast_triton.cast_columns_on_device(x, groups), cast.cast_columns(x, groups))
    x = heavy_tailed(9, 40, seed=2).bfloat16()
    assert same(cast_triton.cast_columns_on_device(x, None, columns=32), cast.cast_columns(x))
    poisoned = torch.full((5, 3), math.nan)
    assert (cast_triton.cast_columns_on_device(poisoned).codes[:, 5:] == 0).all()


def case_both_are_rows_and_columns() -> None:
    for x, groups in ragged():
        rows, columns = cast_triton.cast_both_on_device(x, groups)
        assert same(rows, cast.cast_rows(x)) and same(columns, cast.cast_columns(x, groups))


def case_retiling_is_that_of_the_cpu_form() -> None:
    for x, groups in ragged():
        tiles = cast.cast_rows(x)
        wanted = cast.columns_of(tiles, groups)
        assert same(cast_triton.columns_of_on_device(tiles, groups), wanted)
        if groups is None:  # scales at other strides
            ours = cast_triton.cast_rows_on_device(x)
            assert same(cast_triton.columns_of_on_device(ours, groups), wanted)


def gated_inputs() -> list[tuple[Tensor, Tensor | None, Groups | None]]:
    weights = torch.rand(135, generator=torch.Generator().manual_seed(6))
    wild = heavy_tailed(9, 256, seed=8, spread=2.0)
    wild[3, 7], wild[4, 200], wild[5] = math.inf, math.nan, 0.0
    return [
        (heavy_tailed(135, 256, seed=7, spread=1.0), weights, ragged()[0][1]),
        (wild, None, None),
        (heavy_tailed(30, 180, seed=9, spread=1.0), weights[:30], Groups(torch.tensor([0, 30]), CPU)),
        (torch.empty(0, 256), torch.empty(0), Groups(torch.tensor([0]), CPU)),
    ]


def case_gated_rows_are_near_those_of_the_cpu_form() -> None:
    for gate_up, weights, _ in gated_inputs():
        ours = cast_triton.cast_gated_on_device(gate_up, weights)
        wanted = cast.cast_gated(gate_up, weights)
        assert_near(ours, wanted)


def case_gated_columns_are_near_those_of_the_cpu_form() -> None:
    for gate_up, weights, groups in gated_inputs():
        tiles = cast.cast_rows(gate_up)
        ours = cast_triton.cast_gated_tiles_on_device(tiles, weights, groups)
        assert_near(ours, cast.cast_gated_tiles(tiles, weights, groups))


def case_gated_backward_is_near_that_of_the_cpu_form() -> None:
    for gate_up, weights, groups in gated_inputs():
        tiles = cast.cast_rows(gate_up)
        d_product = heavy_tailed(gate_up.shape[0], gate_up.shape[1] // 2, seed=10, spread=1.0)
        # Wide programs are fewer, and the interpreter's time goes by programs; one input has the default.
        size = {} if weights is None else {"columns": 128}
        ours = cast_triton.gated_backward_cast_on_device(d_product, tiles, weights, groups, **size)
        wanted = cast.gated_backward_cast(d_product, tiles, weights, groups)
        assert_near(ours[0], wanted[0])
        assert_near(ours[1], wanted[1])
        if weights is None:
            assert ours[2] is None and wanted[2] is None
        else:
            torch.testing.assert_close(ours[2], wanted[2], rtol=1e-4, atol=1e-4)


def assert_near(ours: Tiles, theirs: Tiles) -> None:
    """NaN in the same places; else equal but for elements that lay next to a tie, one code apart."""
    found, wanted = cast.decode(ours), cast.decode(theirs)
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = found.nan_to_num(0.0, 0.0, 0.0), wanted.nan_to_num(0.0, 0.0, 0.0)
    quantum = theirs.scales.nan_to_num(0.0).repeat_interleave(128, 1)[:, : wanted.shape[1]] * 2.0**-9
    assert ((found - wanted).abs() <= (wanted.abs() * 2.0**-3).maximum(quantum)).all()
    assert (ours.codes != theirs.codes).sum() <= 0.002 * ours.codes.numel()


def case_norm_is_near_and_its_tiles_are_those_of_its_output() -> None:
    for shape in ((5, 300), (3, 128), (1, 1), (0, 130)):
        for dtype in (torch.bfloat16, torch.float32):
            x = heavy_tailed(*shape, seed=11, spread=1.0).to(dtype)
            gain = torch.rand(shape[1], generator=torch.Generator().manual_seed(12)) + 0.5
            out, rstd, tiles = cast_triton.cast_normed_on_device(x, gain, 1e-6)
            wanted, wanted_rstd, _ = cast.cast_normed(x, gain, 1e-6)
            torch.testing.assert_close(out, wanted, rtol=2.0**-7 if dtype == torch.bfloat16 else 1e-5, atol=0)
            torch.testing.assert_close(rstd, wanted_rstd, rtol=1e-5, atol=0)
            assert same(tiles, cast.cast_rows(out))


def case_blocks_are_those_of_the_cpu_form_and_so_are_the_transposed() -> None:
    weights = [
        heavy_tailed(132, 130, seed=13).bfloat16(),
        heavy_tailed(2 * 130, 31, seed=14).view(2, 130, 31),  # rows of no multiple of 4
        special_tiles(140),
        torch.empty(0, 128, 128),
    ]
    for weight in weights:
        wanted = cast.cast_weight(weight)
        assert same(cast_triton.cast_weight_on_device(weight), wanted)
        blocks, transposed = cast_triton.cast_weight_both_on_device(weight)
        assert same(blocks, wanted) and same(transposed, wanted.transposed())


def case_decoding_gives_the_values_of_the_cpu_form() -> None:
    for x, _ in ragged():
        tiles = cast_triton.cast_rows_on_device(x)
        for dtype in (torch.float32, torch.bfloat16):
            assert same_bits(cast_triton.decode_on_device(tiles, dtype), cast.decode(tiles, dtype))
    blocks = cast.cast_weight(heavy_tailed(2 * 130, 31, seed=14).view(2, 130, 31))
    assert same_bits(cast_triton.decode_on_device(blocks), cast.decode(blocks))


def case_columns_of_groups_are_put_together_as_by_one_copy_for_each() -> None:
    for counts in ([0, 128, 0, 384, 128], [256], [0, 0]):
        padded = torch.tensor(counts)
        codes = torch.randint(256, (70, sum(counts)), dtype=torch.uint8).view(torch.float8_e4m3fn)
        spans = spans_of(padded).to(torch.int32)
        ours, plain = group_major_on_device(codes, spans), group_major(codes, counts)
        assert torch.equal(ours.view(torch.uint8), plain.view(torch.uint8)), counts


def case_the_comparison_sees_the_interpreters_own_cast() -> None:
    """The planted fault: that cast is wrong in about 2% of the values, and must not pass."""
    x = on_ties(128)
    assert not same(cast_triton.cast_rows_on_device(x, hardware_cast=True), cast.cast_rows(x))


def case_the_comparison_sees_a_gap_that_is_not_zero() -> None:
    tiles = cast_triton.cast_columns_on_device(torch.ones(5, 3))
    wanted = cast.cast_columns(torch.ones(5, 3))
    assert same(tiles, wanted)
    tiles.codes[2, 100] = 1
    assert not same(tiles, wanted)


def main(module: dict[str, Any]) -> None:
    # NumPy, which the interpreter computes with, warns of products that the poisoned tiles discard.
    warnings.simplefilter("ignore", RuntimeWarning)
    results = {}
    for name, case in sorted(module.items()):
        if name.startswith("case_") and (len(sys.argv) < 2 or sys.argv[1] in name):
            try:
                case()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(globals())
