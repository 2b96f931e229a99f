"""Ranks that fail are started again where that helps, and only there; nothing is left behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cli.small_run import ROOT

pytestmark = pytest.mark.launcher

_CASES: dict[str, dict[str, Any]] = {
    "killed once": {"deeds": ["1:kill@1", "sleep@1", "fine"], "restarts": 2},
    "killed always": {"deeds": ["1:kill", "0:hang"], "restarts": 1},
    "mistake": {"deeds": ["code=2"], "restarts": 3},
    "defect": {"deeds": ["1:code=1", "0:code=3"], "restarts": 3},
    "no restarts": {"deeds": ["0:kill", "sleep"], "restarts": 0},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, temp = tmp_path_factory.mktemp("restarts"), tmp_path_factory.mktemp("temp")
    process = _start(list(_CASES.values()), folder, temp)
    output, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    results = dict(zip(_CASES, json.loads(output.splitlines()[-1]), strict=True))
    for number, result in enumerate(results.values()):
        result["events"], result["said"] = _events(folder / str(number)), said
    assert _left_in(temp) == []
    return results


def _start(cases: list[dict[str, Any]], folder: Path, temp: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.cli.supervised", json.dumps(cases), str(folder)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "TMPDIR": str(temp)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def _left_in(temp: Path) -> list[str]:
    return [path.name for path in temp.iterdir() if not path.name.startswith("torchinductor_")]


def _events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_rank_that_was_killed_is_started_again_with_all_others(ran: dict[str, dict[str, Any]]) -> None:
    once = ran["killed once"]
    assert (once["code"], once["message"]) == (0, "")
    fault, restart = once["events"]
    assert (fault["kind"], fault["attempt"], fault["rank"]) == ("fault", 1, 1)
    assert "rank 1 was ended by SIGKILL" in fault["cause"] and fault["exit_codes"] == {"1": -9}
    assert (restart["kind"], restart["attempt"], restart["wait_s"]) == ("restart", 2, 0)
    assert "attempt 2 begins (restart 1 of 2 without a new checkpoint)" in once["said"]


def test_restarts_end_when_none_reaches_a_checkpoint_and_deaf_ranks_are_killed(
    ran: dict[str, dict[str, Any]],
) -> None:
    always = ran["killed always"]
    assert always["code"] == 3 and "1 restarts in a row reached no new checkpoint" in always["message"]
    assert [event["kind"] for event in always["events"]] == ["fault", "restart", "fault"]
    assert always["seconds"] < 5 * 6  # two attempts, each with 2 s for the deaf rank's last words


def test_a_mistake_is_not_repeated_and_a_defect_once(ran: dict[str, dict[str, Any]]) -> None:
    assert (ran["mistake"]["code"], ran["mistake"]["message"]) == (2, "message of code 2")
    assert [event["kind"] for event in ran["mistake"]["events"]] == ["fault"]
    assert ran["defect"]["code"] == 1 and "same defect a second time" in ran["defect"]["message"]
    assert [event["kind"] for event in ran["defect"]["events"]] == ["fault", "restart", "fault"]


def test_no_restarts_is_no_restart(ran: dict[str, dict[str, Any]]) -> None:
    assert ran["no restarts"]["code"] == 3
    assert "rank 0 was ended by SIGKILL" in ran["no restarts"]["message"]
    assert "resumes from the last checkpoint" in ran["no restarts"]["message"]


def test_no_process_and_no_open_file_is_left(ran: dict[str, dict[str, Any]]) -> None:
    assert all(result["left"] == [] for result in ran.values())
    files = [result["files"] for result in ran.values()]
    assert files[-1] <= files[0] + 4  # the listeners of signals, and a few that Python keeps


def test_a_second_signal_ends_deaf_ranks_at_once(tmp_path: Path) -> None:
    temp = tmp_path / "temp"
    temp.mkdir()
    process = _start([{"deeds": ["hang"], "restarts": 3}], tmp_path, temp)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    ranks = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.7)  # signals that come closer are one wish
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output, said = process.communicate(timeout=30)
    assert time.monotonic() - asked < 5 * 2  # the matrix: 2 s
    assert "once more to stop at once" in said
    assert json.loads(output.splitlines()[-1])[0]["code"] == 130
    assert len(ranks) == 2 and not psutil.wait_procs(ranks, timeout=5)[1]
    assert _left_in(temp) == []
