"""What the launcher adds to a run's records and reads of them."""

import json
from pathlib import Path

from moe_runtime.cli.supervise.journal import Journal
from moe_runtime.metrics.jsonl import JsonLines, read_jsonl


def test_a_line_follows_those_of_ranks_and_a_torn_one_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind": "checkpoint"}\n{"kind": "chec')
    Journal(tmp_path).event("fault", rank=1)
    again = JsonLines(path)
    again.append({"kind": "resume"})
    again.close()
    assert [line["kind"] for line in read_jsonl(path)] == ["checkpoint", "fault", "resume"]


def test_a_run_folder_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "none")
    journal.event("fault")
    assert not (tmp_path / "none").exists()
    assert (journal.steps_done(), journal.checkpoint_step()) == (0, 0)
    assert Journal(None).steps_done() == 0


def test_steps_and_checkpoints_are_read_from_the_folder(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "layers": "x" * 9000}) for step in range(1, 30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 30, "lo')
    for step in (2, 12, 8):
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    journal = Journal(tmp_path)
    assert (journal.steps_done(), journal.checkpoint_step()) == (29, 12)
