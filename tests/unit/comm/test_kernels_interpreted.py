"""The GPU kernels in Triton's interpreter, one process for all cases; see kernel_cases.py."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[3]
_CASES = re.findall(r"^def (case_\w+)", Path(__file__).with_name("kernel_cases.py").read_text(), re.MULTILINE)


def _run(code: str) -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore::RuntimeWarning", "-c", code]
    done = subprocess.run(command, cwd=_ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    """What went wrong in each case; empty where nothing did."""
    pytest.importorskip("triton")
    return _run("from tests.unit.comm.kernel_cases import main; main()")


@pytest.mark.parametrize("case", _CASES)
def test_interpreted(case: str, outcomes: dict[str, str]) -> None:
    assert outcomes[case] == "", outcomes[case]
