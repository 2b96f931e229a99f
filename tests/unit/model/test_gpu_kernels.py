"""The model's kernels for GPUs: right in Triton's interpreter (gpu_kernel_cases.py), and they compile."""

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

from tests.unit.comm.test_kernels_compiled import SPILLS, Launch, cache, compile_sm90, launches

__all__ = ["cache", "launches"]

_ROOT = Path(__file__).parents[3]
_CASES = re.findall(
    r"^def (case_\w+)", Path(__file__).with_name("gpu_kernel_cases.py").read_text(), re.MULTILINE
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case; empty where nothing did."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.model.gpu_kernel_cases"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", _CASES)
def test_interpreted(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "", outcomes[case]


def calls() -> dict[str, Callable[[], Any]]:
    from moe_runtime.model import gated_triton, heads_triton

    q, kv = (torch.zeros(1, 2, 128, width, dtype=torch.bfloat16) for width in (192, 256))
    k_rope, turns = (
        torch.zeros(1, 2, 576, dtype=torch.bfloat16)[..., 512:],
        torch.zeros(2, 32).to(torch.complex64),
    )
    gate_up, d_gate_up, pull = (torch.zeros(4, width, dtype=torch.bfloat16) for width in (4096, 4096, 2048))
    weights = torch.zeros(4)
    return {
        "join": lambda: heads_triton.join_heads(q, kv, k_rope, turns),
        "part": lambda: heads_triton.part_heads(q, q, kv[..., :128], turns),
        "gated": lambda: gated_triton.gated(gate_up, weights),
        "gated_backward": lambda: gated_triton.gated_backward(pull, gate_up, d_gate_up, weights),
    }


@pytest.mark.parametrize(
    "name", ["part", "gated_backward", *(pytest.param(n, marks=pytest.mark.slow) for n in ("join", "gated"))]
)
def test_compiles_for_sm_90_without_spills_and_with_wide_accesses(
    name: str, launches: list[Launch], cache: Path
) -> None:
    calls()[name]()
    assert len(launches) == 1
    binary = compile_sm90(launches[0], cache)
    assert binary.count(SPILLS) == 0
    loads, stores = (binary.count(rf"{op}\.E\.(64|128)") for op in ("LDG", "STG"))
    assert loads and stores, binary.instructions
