""".ci/run goes through all its steps, and ends with a failure if any of them fails."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.arch.sources import ROOT

# Stands in for launch.sh and for Python: takes a note, fails if asked to, and "trains" six steps.
_STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$NOTES"
[[ -z ${FAILING:-} || "$(basename "$0") $*" != $FAILING ]] || exit 1
for word in "$@"; do
  [[ $word == out_dir=* ]] || continue
  mkdir -p "${word#out_dir=}/ci" && seq "${STEPS:-6}" >"${word#out_dir=}/ci/metrics.jsonl"
done
"""
_STEPS = (
    "launch.sh config schema",
    "python -m ruff check .",
    "python -m ruff format --check .",
    "python -m mypy",
    "shellcheck launch.sh .ci/run",
    "launch.sh train configs/run/quickstart.yaml",
    "launch.sh test -rs",
    "launch.sh test --all -m slow",
)


def _run(folder: Path, **variables: str) -> tuple[int, list[str]]:
    for name in ("launch.sh", ".venv/bin/python", "bin/shellcheck", "bin/chromium"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(_STAND_IN)
        (folder / name).chmod(0o755)
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", folder / ".ci")
    environment = {
        **os.environ,
        "NOTES": str(folder / "notes"),
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        **variables,
    }
    done = subprocess.run([folder / ".ci/run"], env=environment, capture_output=True, timeout=60)
    return done.returncode, (folder / "notes").read_text().splitlines()


def test_every_step_is_taken_and_all_well_is_exit_code_0(tmp_path: Path) -> None:
    code, notes = _run(tmp_path)
    assert code == 0 and len(notes) == len(_STEPS)
    assert all(note.startswith(step) for note, step in zip(notes, _STEPS, strict=True))


@pytest.mark.parametrize("step", _STEPS)
def test_a_step_that_fails_is_the_last_one_and_fails_the_whole(tmp_path: Path, step: str) -> None:
    code, notes = _run(tmp_path, FAILING=f"{step}*")
    assert code != 0 and notes[-1].startswith(step)


def test_a_training_that_records_too_few_steps_fails_the_whole(tmp_path: Path) -> None:
    code, notes = _run(tmp_path, STEPS="5")
    assert code != 0 and notes[-1].startswith("launch.sh train")
