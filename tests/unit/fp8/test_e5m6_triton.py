"""E5M6's kernels: bit-exact in Triton's interpreter (e5m6_cases.py), and compiled for sm_90 ahead of time."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_runtime.fp8.e5m6 import Packed, columns_of_packed, pack_e5m6, packed_width, unpack_e5m6
from moe_runtime.fp8.tiled import Groups, Tiles, num_tiles
from tests.unit.comm.test_kernels_compiled import SPILLS, Launch, cache, compile_sm90, launches
from tests.unit.comm.wire_values import random_bits, same_bits, special_tiles
from tests.unit.fp8.fp8_values import mixed, poisoned, same

__all__ = ["cache", "launches"]

_ROOT = Path(__file__).parents[3]
_CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("e5m6_cases.py").read_text(), re.MULTILINE)
ROWS, HIDDEN = 512, 16384


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case; empty where nothing did."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.fp8.e5m6_cases"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", _CASES)
def test_interpreted(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "", outcomes[case]


def calls() -> dict[str, Callable[[], Any]]:
    from moe_runtime.fp8 import e5m6_triton as t

    data = torch.zeros(ROWS, packed_width(HIDDEN), dtype=torch.uint8)
    packed = Packed(data, torch.ones(ROWS, num_tiles(HIDDEN)), HIDDEN)
    groups = Groups.one(ROWS, torch.device("cpu"))
    x = torch.zeros(ROWS, HIDDEN, dtype=torch.bfloat16)
    return {
        "pack": lambda: t.pack_e5m6_on_device(x),
        "unpack": lambda: t.unpack_e5m6_on_device(packed, torch.bfloat16, hardware_cast=True),
        "columns": lambda: t.columns_of_packed_on_device(packed, groups, hardware_cast=True),
    }


@pytest.mark.parametrize("name", ["pack", "columns", pytest.param("unpack", marks=pytest.mark.slow)])
def test_compiles_for_sm_90_without_spills_and_with_wide_accesses(
    name: str, launches: list[Launch], cache: Path
) -> None:
    calls()[name]()
    assert len(launches) == 1
    binary = compile_sm90(launches[0], cache)
    assert binary.count(SPILLS) == 0
    loads, stores = (binary.count(rf"{op}\.E\.(64|128)") for op in ("LDG", "STG"))
    assert loads and stores, binary.instructions


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_bits_of_the_cpu_form() -> None:
    for x in (poisoned(mixed(700, 515, 1)), random_bits(600, 384, 2), special_tiles(131)):
        packed, ours = pack_e5m6(x), pack_e5m6(x.cuda())
        assert torch.equal(ours.data.cpu(), packed.data) and same_bits(ours.scales.cpu(), packed.scales)
        for dtype in (torch.float32, torch.bfloat16):
            assert same_bits(unpack_e5m6(ours, dtype).cpu(), unpack_e5m6(packed, dtype))
        wanted, made = columns_of_packed(packed), columns_of_packed(ours)
        assert same(Tiles(made.codes.cpu(), made.scales.cpu()), wanted)
