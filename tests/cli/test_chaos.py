"""`moe-runtime chaos`: its faults are ones that `train` takes, its figures are those of the records, and a
run under it ends as one without."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moe_runtime.checkpoint.store import Saved
from moe_runtime.cli.chaos.decisions import decisions_of
from moe_runtime.cli.chaos.draw import CHANGING, EXACT, PREEMPT, Draw, kinds_of
from moe_runtime.cli.chaos.report import Report, Struck, text_of
from moe_runtime.cli.chaos.same import differences
from moe_runtime.cli.chaos.watch import Watch, productive_s
from moe_runtime.errors import ConfigError
from moe_runtime.train.fault import read_faults
from tests.cli.small_run import ROOT, write_config
from tests.unit.checkpoint.samples import META, contribution, open_store


def test_every_fault_that_is_drawn_is_one_that_train_takes() -> None:
    draw = Draw(5, 4, kinds_of("all"), has_exchanges=True)
    drawn = [draw.fault(step) for step in range(1, 400)]
    faults = read_faults([fault for fault in drawn if fault != PREEMPT], 4)
    assert {fault.kind for fault in faults} | {PREEMPT} == {*EXACT, *CHANGING}
    assert {fault.rank for fault in faults} == {0, 1, 2, 3}
    again = Draw(5, 4, kinds_of("all"), has_exchanges=True)
    assert drawn == [again.fault(step) for step in range(1, 400)]
    dense = Draw(5, 4, kinds_of("all"), has_exchanges=False)
    assert not [fault for _ in range(400) if (fault := dense.fault(1)).endswith(("dispatch", "combine"))]


def test_pauses_are_bounded_and_about_their_mean() -> None:
    draw = Draw(1, 2, EXACT, has_exchanges=True)
    pauses = [draw.pause(5.0) for _ in range(2000)]
    assert max(pauses) <= 15.0 and 4.0 < sum(pauses) / len(pauses) < 6.0


def test_an_unknown_kind_is_told_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"--kinds: expected exact, all, or some of .*sigkill.* got 'meteor'"
    ):
        kinds_of("sigkill,meteor")


def test_the_watch_sees_steps_once_and_begins_anew_with_a_shorter_file(tmp_path: Path) -> None:
    records, watch = tmp_path / "metrics.jsonl", Watch(tmp_path)
    assert watch.look() == 0
    lines = [json.dumps({"step": step, "step_s": 0.5}) + "\n" for step in range(1, 6)]
    records.write_text("".join(lines[:4]) + lines[4][:5])
    assert watch.look() == 4 and set(watch.stamps) == {1, 2, 3, 4}
    records.write_text("".join(lines[:2]))
    assert watch.look() == 2 and set(watch.stamps) == {1, 2}
    assert productive_s(tmp_path) == 1.0


def test_decisions_are_those_of_the_records_that_count(tmp_path: Path) -> None:
    lines = [{"step": 1, "skipped": False}, {"step": 2, "skipped": True}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert decisions_of(tmp_path) == ["train.skip_updates=[2]"]


def test_two_states_are_equal_or_their_files_are_named(tmp_path: Path) -> None:
    for name, of_step in (("a", 4), ("b", 4), ("c", 5)):
        assert isinstance(open_store(tmp_path / name).save(4, contribution(of_step), META), Saved)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    found = differences(tmp_path / "a", tmp_path / "c")
    assert {"weights-00000.safetensors", "optimizer-00000.safetensors"} <= set(found)


def test_a_report_is_good_only_if_nothing_is_wrong() -> None:
    fine = Struck("sigkill:rank0:step3:data", 3, 0.2, 7.0, 1, "rank 0 was ended by SIGKILL", True, True)
    assert Report(0, struck=[fine]).is_good
    lost = Report(0, struck=[Struck("sigkill:rank0:step3:data", 3)])
    bad = (lost, Report(0, orphans=[7]), Report(0, differences=["x"]), Report(0, failure="y"))
    assert not any(report.is_good for report in bad)
    report = Report(0, steps=10, wall_s=20.0, productive_s=5.0, struck=[fine])
    assert report.to_json()["effective_share"] == 0.25 and "25.0%" in text_of(report)
    assert "NOT SURVIVED" in text_of(bad[0]) and "FAILED" in text_of(bad[2])


@pytest.mark.slow
@pytest.mark.launcher
def test_a_run_under_random_faults_ends_as_one_without(tmp_path: Path) -> None:
    config = write_config(tmp_path, layout={"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"})
    command = [sys.executable, "-m", "moe_runtime", "chaos", str(config), "batch.global_batch_size=8"]
    options = ["--seconds", "120", "--every", "5", "--seed", "4", "--json"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=900)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["good"], found
    assert found["faults"] == found["survived"] > 2 and found["attributed"] == found["to_attribute"]
