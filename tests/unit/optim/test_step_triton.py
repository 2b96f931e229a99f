"""The Triton step: interpreted, compiled for sm_90 ahead of time, and on a GPU."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arch.sources import ROOT

triton = pytest.importorskip("triton", reason="needs triton (extra gpu)")

CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("step_interpreted.py").read_text(), re.M)
POINTERS = {"values": "*fp32", "mean_codes": "*u8", "root_codes": "*u8", "scales": "*u8"}
POINTERS |= {"working": "*bf16", "counters": "*i64"}
FLAGS = ("MASKED", "CARRIES", "WORKING", "COUNTED")
# What a launch cannot know to be aligned to 16 is not said to be, as the kernel's decorator has it.
UNALIGNED = ("mean_codes", "root_codes", "working")


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case; empty where nothing did."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.optim.step_interpreted"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_interpreted(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "", outcomes[case]


class Made:
    """A kernel compiled for sm_90: PTX, and how often each instruction stands in the machine code."""

    def __init__(self, folder: Path, grads: str = "*fp32", num_warps: int = 1, **flags: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        from moe_runtime.optim.fused_step_triton import fused_step_kernel as kernel

        constants = {name: flags.get(name, False) for name in FLAGS} | {"ROWS": flags.get("ROWS", 2)}
        pointers = POINTERS | {"grads": grads}
        signature, values, attributes = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            number = "i32" if name in ("num_elements", "first_block", "carry") or "_word" in name else "fp32"
            number = "i32" if name.startswith("next_") else number
            signature[name] = "constexpr" if name in constants else pointers.get(name, number)
            if name in constants:
                values[(place,)] = constants[name]
            elif name in pointers and name not in UNALIGNED:
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=attributes)
        options = {"num_warps": num_warps, "enable_fp_fusion": False}
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        self.ptx: str = built.asm["ptx"]
        file = folder / "kernel.cubin"
        file.write_bytes(built.asm["cubin"])
        disassemble = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        code = subprocess.run(disassemble, capture_output=True, text=True, check=True).stdout
        self.count = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", code))

    def has(self, prefix: str) -> int:
        return sum(number for name, number in self.count.items() if name.startswith(prefix))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_compiles_for_sm_90_in_wide_accesses_without_spills_or_other_bits(tmp_path: Path) -> None:
    made = Made(tmp_path, WORKING=True)
    assert not made.has("LDL") and not made.has("STL")
    assert not made.has("BAR") and not made.has("LDS")  # a program is a warp: nothing is exchanged
    # Two rows of 4 elements a thread: weight and gradient, codes, weight, codes, working copy.
    assert (made.count["LDG.E.EF.128"], made.count["LDG.E.EF"]) == (4, 4)
    assert (made.count["STG.E.128"], made.count["STG.E"], made.count["STG.E.64"]) == (2, 4, 2)
    assert "div.rn.f32" in made.ptx and "sqrt.rn.f32" in made.ptx and "cvt.rn.bf16" in made.ptx
    assert not [
        word for word in ("fma.", ".ftz", "div.full", "div.approx", "sqrt.approx") if word in made.ptx
    ]


@pytest.mark.slow
@pytest.mark.parametrize("grads", ["*fp32", "*bf16"])
@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize(("rows", "num_warps"), [(2, 1), (8, 4)])
def test_every_variant_compiles_for_sm_90_without_spills(
    flag: str, grads: str, rows: int, num_warps: int, tmp_path: Path
) -> None:
    made = Made(tmp_path, grads, num_warps, ROWS=rows, **{flag: True})
    assert not made.has("LDL") and not made.has("STL") and "fma." not in made.ptx


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_bits_of_the_plain_step() -> None:
    from moe_runtime.cli.bench_optim.cuda import wrong_bits

    assert wrong_bits(torch.device("cuda")) == []
