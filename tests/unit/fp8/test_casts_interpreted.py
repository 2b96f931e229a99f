"""The casts' kernels in Triton's interpreter, one process for all cases; see cast_cases.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("cast_cases.py").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case; empty where nothing did."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.unit.fp8.cast_cases"]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", _CASES)
def test_interpreted(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "", outcomes[case]
