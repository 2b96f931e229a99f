"""Whether a run goes on is told without ever touching its lock."""

from pathlib import Path

import pytest

from moe_runtime.metrics.report.run_state import run_state
from moe_runtime.train.run_lock import lock_run


def test_a_run_whose_folder_a_process_holds_is_running(tmp_path: Path) -> None:
    lock = lock_run(tmp_path)
    assert lock is not None
    state = run_state(tmp_path, [{"kind": "finished", "step": 3}], 3)
    assert state.word == "running"
    lock.close()
    assert run_state(tmp_path, [{"kind": "finished", "step": 3}], 3).word == "finished"


@pytest.mark.parametrize(
    ("kinds", "step", "word"),
    [
        ((), 0, "not begun"),
        (("attempt",), 7, "not running"),
        (("attempt", "stopped"), 7, "stopped"),
        (("attempt", "preempted"), 7, "stopped"),
        (("attempt", "fault"), 7, "failed"),
        (("fault", "attempt", "checkpoint", "finished"), 7, "finished"),
        (("finished", "resume"), 7, "not running"),
    ],
)
def test_how_a_run_ended_is_told_by_its_last_word(
    kinds: tuple[str, ...], step: int, word: str, tmp_path: Path
) -> None:
    (tmp_path / ".lock").write_text("999999999 on elsewhere\n")
    assert run_state(tmp_path, [{"kind": kind, "step": step} for kind in kinds], step).word == word
