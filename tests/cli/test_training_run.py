"""Real runs through the real launcher: kill, resume, stop, and what a user can do wrong."""

import json
import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from moe_runtime.metrics.heatmap import HEATMAP_FILE, read_heatmap
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.panel import HEATMAP, SAMPLES, TIMELINE, flat_values
from moe_runtime.metrics.record import NUMERICS_KEYS, metric_of
from moe_runtime.planner.hardware.save import cluster_text
from tests.cli.small_run import (
    digests,
    finish,
    run,
    start,
    steps_done,
    wait_for_checkpoint,
    wait_for_step,
    write_config,
)
from tests.unit.planner.host.machine import made_up
from tests.wandb_file import only_file, read_wandb

pytestmark = pytest.mark.launcher


def _ranks(launcher: int) -> list[psutil.Process]:
    """The rank processes below a launcher."""
    children = psutil.Process(launcher).children(recursive=True)
    return [child for child in children if "-m moe_runtime train" in " ".join(child.cmdline())]


def _listens_on(processes: list[psutil.Process]) -> set[str]:
    """Addresses on which anybody may connect to these processes."""
    found = [each for process in processes for each in process.net_connections("inet")]
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    code, output = run("train", str(write_config(folder)), "--wandb", "offline")
    assert code == 0, output
    return folder


def test_a_run_says_what_it_does_and_records_every_step(uninterrupted: Path) -> None:
    run_dir = uninterrupted / "runs" / "small"
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 9))
    wanted = {"tokens", "loss", "loss_mtp", "loss_balance", "grad_norm", "lr", "tokens_per_s", "step_s"}
    wanted |= {"bubble_fraction", "exposed_comm_fraction", "comm_bytes_inter", "comm_bytes_intra"}
    assert all(wanted | {"max_violation", "layers"} <= set(record) for record in records)
    assert [record["step"] for record in records if "val_bpb" in record] == [4, 8]
    counted = {record["step"]: record["optim_numerics"] for record in records if "optim_numerics" in record}
    assert counted.keys() == {4, 8}
    assert all(set(found) == set(NUMERICS_KEYS) for found in counted[8].values())
    assert {"dense", "dense_no_decay", "experts"} <= set(counted[8])
    assert 0.1 < counted[8]["dense"]["largest_update"] < 10 and counted[8]["dense"]["nonfinite"] == 0
    assert records[-1]["loss"] < records[0]["loss"]
    events = [json.loads(line)["kind"] for line in (run_dir / "events.jsonl").read_text().splitlines()]
    assert events.count("checkpoint") == 4 and events.count("sample") == 1 and "finished" in events


def test_the_load_of_experts_over_time_is_what_the_records_say(uninterrupted: Path) -> None:
    run_dir = uninterrupted / "runs" / "small"
    steps, layers, load = read_heatmap(run_dir / HEATMAP_FILE)
    assert (steps, layers, load.shape) == ([2, 4, 6, 8], ["layers.1", "mtp.0.block"], (4, 2, 8))
    records = {record["step"]: record for record in read_jsonl(run_dir / "metrics.jsonl")}
    for time_, step in enumerate(steps):
        for row, layer in zip(load[time_], layers, strict=True):
            told = records[step]["layers"][layer]
            assert abs(row.max() - told["load_max"]) < 1 / 256 and abs(row.min() - told["load_min"]) < 1 / 256
            assert abs(row.mean() - 1) < 1 / 256


def test_a_record_says_what_the_run_went_through(uninterrupted: Path) -> None:
    records = list(read_jsonl(uninterrupted / "runs" / "small" / "metrics.jsonl"))
    for record in records:
        assert 0 < record["ettr"] <= 1 and record["train_s"] <= record["run_s"]
        assert (record["restarts"], record["lost_steps"], record["digest_mismatches"]) == (0, 0, 0)
    steps_s = sum(record["step_s"] for record in records)
    assert records[-1]["train_s"] == pytest.approx(steps_s)
    last = records[-1]
    assert 2 <= last["verified_step"] < 8 and last["checkpoint_age"] == 8 - last["verified_step"]
    assert last["checkpoint_s"] > last["checkpoint_blocked_s"] > 0


def test_wandb_has_the_digits_of_a_run_and_no_key_that_is_not_documented(uninterrupted: Path) -> None:
    run_dir = uninterrupted / "runs" / "small"
    found, media = read_wandb(only_file(run_dir)), {HEATMAP, SAMPLES, TIMELINE}
    assert media <= found.keys and [key for key in found.keys - media if metric_of(key) is None] == []
    rows = {
        row["_step"]: {key: row[key] for key in row if key not in media and not key.startswith("_")}
        for row in found.history
    }
    assert rows == {line["step"]: flat_values(line) for line in read_jsonl(run_dir / "metrics.jsonl")}


def test_the_other_rank_has_a_log_of_its_own(uninterrupted: Path) -> None:
    (log,) = (uninterrupted / "runs" / "small" / "logs").iterdir()
    assert log.name == "rank1.log" and log.read_text().startswith("--- ")


def test_the_trace_of_a_run_is_drawn_and_simulated(uninterrupted: Path, tmp_path: Path) -> None:
    trace, drawing = uninterrupted / "runs" / "small" / "trace.json", tmp_path / "step.svg"
    code, output = run("schedule", "--trace", str(trace), "--svg", str(drawing), "--json")
    assert code == 0, output
    found = json.loads(output)
    assert found["schedule"] == "dualpipe" and found["measured"]["makespan"] > 0
    assert drawing.read_text().startswith("<svg")
    told = json.loads(trace.read_text())
    lanes = {event["cat"] for event in told["traceEvents"] if event["ph"] in "XC"}
    assert lanes == {"action", "phase", "wait", "transfer", "live"}  # ep 1: no exchange
    assert told["otherData"]["step"] == 3


def test_a_run_is_held_against_its_plan(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir, cluster = str(uninterrupted / "runs" / "small"), tmp_path / "here.yaml"
    cluster.write_text(cluster_text(made_up()))
    code, output = run("plan", "--validate", run_dir, "--cluster", str(cluster), "--json")
    assert code == 0, output
    lines = {line["name"]: line for line in json.loads(output)["lines"]}
    assert lines["step"]["predicted"] > 0 and lines["step"]["measured"] > 0
    assert {"forward", "input grad", "weight grad", "message wait", "update"} <= lines.keys()
    assert lines["exchanged within nodes, from its rows"]["error"] == 0  # ep 1: none


def test_a_run_whose_rank_was_killed_goes_on_by_itself_to_the_same_bits(
    uninterrupted: Path, tmp_path: Path
) -> None:
    config, run_dir = write_config(tmp_path), tmp_path / "runs" / "small"
    process = start("train", str(config))
    wait_for_checkpoint(run_dir, process)
    ranks = _ranks(process.pid)
    assert len(ranks) == 2
    assert _listens_on([psutil.Process(process.pid), *ranks]) == {"127.0.0.1"}
    ranks[1].send_signal(signal.SIGKILL)
    code, output = finish(process, timeout_s=60)
    assert code == 0 and "rank 1 was ended by SIGKILL" in output and "attempt 2 | step 8/8" in output, output
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    assert steps_done(run_dir) == list(range(1, 9))
    assert digests(run_dir, 8) == digests(uninterrupted / "runs" / "small", 8)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    fault = next(event for event in events if event["kind"] == "fault")
    assert (fault["rank"], fault["attempt"]) == (1, 1) and fault["step"] >= 2
    assert next(event for event in events if event["kind"] == "resume")["attempt"] == 2
    assert (run_dir / HEATMAP_FILE).read_bytes() == (
        uninterrupted / "runs" / "small" / HEATMAP_FILE
    ).read_bytes()
    (recovered,) = (event for event in events if event["kind"] == "recovered")
    begun = next(event for event in events if event["kind"] == "attempt" and event["attempt"] == 2)
    *_, last = read_jsonl(run_dir / "metrics.jsonl")
    assert last["restarts"] == 1 and last["mttr_s"] == recovered["seconds"] > 0
    assert last["lost_steps"] == begun["lost_steps"] == fault["step"] - begun["step"]
    assert last["ettr"] < 1 and last["run_s"] > last["train_s"] + last["mttr_s"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "sigstop:rank1:step4:forward",
        "gil:rank0:step4:backward",
        "exit:rank1:init",
        "flip:rank1:step2:optimizer",  # before there is a checkpoint
    ],
)
def test_a_run_with_a_fault_of_another_kind_goes_on_to_the_same_bits(
    fault: str, uninterrupted: Path, tmp_path: Path
) -> None:
    config, run_dir = write_config(tmp_path), tmp_path / "runs" / "small"
    code, output = run("train", str(config), "--inject", fault, "train.watchdog_s=5")
    assert code == 0 and "attempt 2 | step 8/8" in output, output
    assert digests(run_dir, 8) == digests(uninterrupted / "runs" / "small", 8)
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    told = next(event for event in events if event["kind"] in ("corruption", "fault"))
    blamed = told["damages"][0]["rank"] if told["kind"] == "corruption" else told["rank"]
    assert f"rank {blamed}" == fault.split(":")[1].replace("rank", "rank "), told
    hangs = list((run_dir / "hangs").glob("*/verdict.json"))
    assert len(hangs) == fault.startswith(("sigstop", "gil"))


def test_sigterm_ends_cleanly_with_a_checkpoint_and_a_marker_and_fresh_starts_over(tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path, train__checkpoint_every=0), tmp_path / "runs" / "small"
    process = start("train", str(config), "train.total_steps=100000", "train.eval_every=0")
    wait_for_step(run_dir, 3, process)
    os.kill(process.pid, signal.SIGTERM)
    asked = time.monotonic()
    code, output = finish(process, timeout_s=30)
    assert time.monotonic() - asked < 5 * 5  # the matrix: 5 s
    assert code == 0 and "stopped at step" in output, output
    stopped = steps_done(run_dir)[-1]
    assert digests(run_dir, stopped)
    assert json.loads((run_dir / "preempted.json").read_text())["step"] == stopped
    code, output = run("train", str(config), f"train.total_steps={stopped + 1}", "train.eval_every=0")
    assert code == 0 and f"resuming after step {stopped}" in output, output
    assert f"after step {stopped} and goes on" in output and not (run_dir / "preempted.json").exists()
    code, output = run("train", str(config), "train.total_steps=1", "train.eval_every=0", "--fresh")
    assert code == 0 and "resuming" not in output, output
    assert steps_done(run_dir) == [1]


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path), tmp_path / "runs" / "small"
    first = start("train", str(config), "train.total_steps=100000", "train.eval_every=0")
    wait_for_step(run_dir, 2, first)
    code, output = run("train", str(config), "train.total_steps=100000", "train.eval_every=0")
    assert code == 2 and "is training in this folder" in output, output
    done = steps_done(run_dir)[-1]
    wait_for_step(run_dir, done + 2, first)
    os.kill(first.pid, signal.SIGINT)
    code, output = finish(first, timeout_s=60)
    assert code == 0, output
    assert steps_done(run_dir) == list(range(1, steps_done(run_dir)[-1] + 1))


def test_ranks_whose_launcher_was_killed_save_and_end(tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path, train__checkpoint_every=0), tmp_path / "runs" / "small"
    process = start("train", str(config), "train.total_steps=100000", "train.eval_every=0")
    wait_for_step(run_dir, 2, process)
    ranks = _ranks(process.pid)
    process.kill()
    _, alive = psutil.wait_procs(ranks, timeout=30)
    assert not alive
    assert digests(run_dir, steps_done(run_dir)[-1])
