"""W&B in real trouble of every kind: training never notices, and says so once."""

import builtins
import io
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from moe_runtime.metrics.console import ConsoleSink
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.metrics.wandb_sink import WandbSink
from moe_runtime.parallel.peers import Peers
from tests.unit.metrics.test_recorder import config, record

pytestmark = pytest.mark.usefixtures("no_wandb_account")


def train(run_dir: Path, mode: str = "offline", steps: int = 5) -> tuple[list[str], str]:
    """Report a few steps; the warnings and what the console showed."""
    out = io.StringIO()
    recorder = Recorder(
        run_dir, config(mode), Peers(), 0, ConsoleSink(30, None, 10, Console(file=out, width=400))
    )
    for step in range(1, steps + 1):
        recorder.step(record(step))
    recorder.close()
    assert [line["step"] for line in read_jsonl(run_dir / "metrics.jsonl")] == list(range(1, steps + 1))
    events = read_jsonl(run_dir / "events.jsonl")
    return [event["message"] for event in events if event["kind"] == "warning"], out.getvalue()


def test_an_offline_run_is_recorded_without_warning_and_keeps_its_id(tmp_path: Path) -> None:
    for _ in range(2):
        warnings, _ = train(tmp_path)
        assert warnings == []
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb" / "run_id").read_text().strip()
    assert len(files) == 2 and {file.stem for file in files} == {f"run-{run_id}"}


def test_no_argument_of_the_command_line_reaches_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--secret=planted-5521"])
    monkeypatch.setenv("PLANTED_TOKEN", "planted-7733")
    train(tmp_path)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in written)
    for path in written:
        data = path.read_bytes()
        assert b"planted-5521" not in data and b"planted-7733" not in data, path


def test_online_without_a_key_records_offline_and_says_so_once(tmp_path: Path) -> None:
    warnings, shown = train(tmp_path, "online")
    assert len(warnings) == 1 and "no API key" in warnings[0] and "\n" not in warnings[0]
    assert shown.count("no API key") == 1
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_without_the_package_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "wandb" or name.startswith("wandb.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb", None)  # what an import of a missing package finds
    warnings, _ = train(tmp_path)
    assert len(warnings) == 1 and warnings[0].startswith("W&B is off from here: ModuleNotFoundError")


def test_a_folder_that_cannot_be_written_turns_wandb_off(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file in the way")
    warnings, _ = train(tmp_path)
    assert len(warnings) == 1 and warnings[0].startswith("W&B is off from here: FileExistsError")


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hanging_service_costs_neither_steps_nor_a_hang(
    tmp_path: Path, kind: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_runtime.metrics.recorder.WandbSink", partial(WandbSink, finish_timeout_s=1.0))
    recorder = Recorder(
        tmp_path, config("offline"), Peers(), 0, ConsoleSink(30, None, 10, Console(file=io.StringIO()))
    )
    recorder.step(record(1))
    deadline = time.monotonic() + 30
    while not list((tmp_path / "wandb").glob("offline-run-*/*.wandb")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (service,) = _services()
    os.kill(service, kind)
    began = time.monotonic()
    for step in range(2, 50):
        recorder.step(record(step))
    assert time.monotonic() - began < 2.0  # nothing waits for W&B; the rest is margin for a busy machine
    recorder.close()
    assert time.monotonic() - began < 10.0
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 50))
    events = [line for line in read_jsonl(tmp_path / "events.jsonl") if line["kind"] == "warning"]
    assert len(events) == 1 and events[0]["message"].startswith("W&B is off from here")
    assert _services() == []


def _services() -> list[int]:
    """Processes of W&B's service that this process started and that still run."""
    children = psutil.Process().children(recursive=True)
    running = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [child.pid for child in running if "wandb-core" in " ".join(child.cmdline())]


def test_opening_the_sink_does_not_wait_for_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = builtins.__import__

    def import_slowly(name: str, *args: object) -> object:
        if name == "wandb":
            time.sleep(0.5)
            raise ImportError("too late")
        return slow(name, *args)

    monkeypatch.setattr(builtins, "__import__", import_slowly)
    began = time.monotonic()
    sink = WandbSink(tmp_path, {}, "run", "project", "offline")
    sink.log({"loss": 1.0}, 1)
    assert time.monotonic() - began < 0.3
    sink.close()
    warning = sink.take_warning()
    assert warning is not None and "too late" in warning
