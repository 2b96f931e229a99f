"""What the casts launch at full width compiles for sm_90 ahead of time, without a GPU, and as it should.

Checked: nothing is spilled, rows and columns are read and written 16 bytes a thread at a time, and the cast
instruction is there where it was asked for, and only there.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.fp8.tiled import Groups, Tiles, num_tiles
from tests.unit.comm.test_kernels_compiled import SPILLS, Launch, cache, compile_sm90, launches

__all__ = ["cache", "launches"]

ROWS, HIDDEN, WIDTH = 512, 7168, 4096
CAST = r"F2FP\.SATFINITE\.E4M3.*"
GROUPS = Groups(torch.tensor([256, 256]), torch.device("cpu"))


def matrix(columns: int) -> torch.Tensor:
    return torch.zeros(ROWS, columns, dtype=torch.bfloat16)


def tiles(columns: int) -> Tiles:
    scales = torch.ones(num_tiles(columns), ROWS).t()
    return Tiles(torch.zeros(ROWS, columns, dtype=torch.uint8), scales)


def calls() -> dict[str, Callable[..., Any]]:
    from moe_runtime.fp8 import cast_triton as c

    weights = torch.zeros(ROWS)
    backward = (matrix(WIDTH // 2), tiles(WIDTH), weights, GROUPS)
    return {
        "rows": lambda **o: c.cast_rows_on_device(matrix(HIDDEN), **o),
        "columns": lambda **o: c.cast_columns_on_device(matrix(HIDDEN), GROUPS, **o),
        "both": lambda **o: c.cast_both_on_device(matrix(HIDDEN), GROUPS, **o),
        "columns_of": lambda **o: c.columns_of_on_device(tiles(HIDDEN), GROUPS, **o),
        "gated": lambda **o: c.cast_gated_on_device(matrix(WIDTH), weights, **o),
        "gated_tiles": lambda **o: c.cast_gated_tiles_on_device(tiles(WIDTH), weights, GROUPS, **o),
        "gated_backward": lambda **o: c.gated_backward_cast_on_device(*backward, **o),
        "normed": lambda **o: c.cast_normed_on_device(matrix(HIDDEN), torch.zeros(HIDDEN), 1e-6, **o),
        "weight": lambda **o: c.cast_weight_on_device(matrix(HIDDEN), **o),
        "weight_both": lambda **o: c.cast_weight_both_on_device(matrix(HIDDEN), **o),
        "decode": lambda **o: c.decode_on_device(tiles(HIDDEN), torch.bfloat16, **o),
    }


NAMES = [
    "rows",
    "columns",
    "both",
    "columns_of",
    "gated",
    "gated_tiles",
    "gated_backward",
    "normed",
    "weight",
    "weight_both",
    "decode",
]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_sm_90_without_spills_and_with_wide_accesses(
    name: str, launches: list[Launch], cache: Path
) -> None:
    calls()[name](hardware_cast=True)
    assert len(launches) == 1
    binary = compile_sm90(launches[0], cache)
    assert binary.count(SPILLS) == 0
    assert binary.count(r"LDG\.E\.128") and binary.count(r"STG\.E\.128")
    assert bool(binary.count(CAST)) == (name != "decode")


@pytest.mark.parametrize("name", ["rows", *(pytest.param(n, marks=pytest.mark.slow) for n in NAMES[1:])])
def test_without_the_cast_instruction_it_compiles_too(name: str, launches: list[Launch], cache: Path) -> None:
    calls()[name](hardware_cast=False)
    binary = compile_sm90(launches[0], cache)
    assert binary.count(SPILLS) == 0 and binary.count(CAST) == 0


def test_putting_groups_together_compiles_with_wide_accesses(launches: list[Launch], cache: Path) -> None:
    from moe_runtime.fp8.gemm_deepgemm_groups import spans_of
    from moe_runtime.fp8.group_major_triton import group_major_on_device

    codes = torch.zeros(WIDTH, ROWS, dtype=torch.uint8).view(torch.float8_e4m3fn)
    group_major_on_device(codes, spans_of(GROUPS.padded_counts).to(torch.int32))
    binary = compile_sm90(launches[0], cache)
    assert binary.count(SPILLS) == 0
    assert binary.count(r"LDG\.E\.128") and binary.count(r"STG\.E\.128")


def test_the_checks_see_a_spill(launches: list[Launch], cache: Path) -> None:
    calls()["columns"](hardware_cast=True)
    assert compile_sm90(launches[0], cache, maxnreg=24).count(SPILLS) > 0
