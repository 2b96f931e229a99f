"""One record, three readers: file, console, W&B; and only on the first rank."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moe_runtime.config.schema import RunConfig
from moe_runtime.metrics.console import ConsoleSink
from moe_runtime.metrics.jsonl import read_jsonl
from moe_runtime.metrics.line import to_line
from moe_runtime.metrics.record import KEYS, METRICS
from moe_runtime.metrics.recorder import Recorder
from moe_runtime.parallel.peers import Peers
from tests.unit.checkpoint.models import CONFIG


def config(wandb: str = "off", **train: Any) -> RunConfig:
    changes = {"metrics": {"wandb": wandb}, "train": {"total_steps": 30, "log_every": 10} | train}
    return RunConfig.model_validate(CONFIG.model_dump() | changes)


def open_recorder(run_dir: Path, tty: bool = False, **options: Any) -> tuple[Recorder, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=tty, width=200, color_system=None)
    resume_step = options.pop("resume_step", 0)
    run = config(**options)
    train = run.train
    shown = ConsoleSink(train.total_steps, train.total_tokens, train.log_every, console)
    return Recorder(run_dir, run, Peers(), resume_step, shown), out


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 64, "loss": 5.0 / step, "tokens_per_s": 1234.5} | more


def test_a_piped_console_has_one_line_every_log_every_steps(tmp_path: Path) -> None:
    recorder, out = open_recorder(tmp_path)
    for step in range(1, 31):
        recorder.step(record(step, max_violation=0.25))
    recorder.close()
    lines = out.getvalue().splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["step 10/30", "step 20/30", "step 30/30"]
    assert "loss 0.5000 | 1,234 tokens/s | load violation 0.25 | 0:00 left" in lines[0]


def test_evaluation_steps_always_have_a_line(tmp_path: Path) -> None:
    recorder, out = open_recorder(tmp_path)
    recorder.step(record(3, val_loss=2.5, val_bpb=3.6))
    recorder.close()
    assert "val 2.5000 | 3.600 bits/byte" in out.getvalue()


def test_a_terminal_has_a_bar(tmp_path: Path) -> None:
    recorder, out = open_recorder(tmp_path, tty=True)
    recorder.step(record(1))
    recorder.step(record(2))
    recorder.say("a message with [brackets]")
    recorder.close()
    assert "━" in out.getvalue() and "step 2/30" in out.getvalue()
    assert "a message with [brackets]" in out.getvalue()


def test_a_run_that_ends_by_tokens_has_progress_too(tmp_path: Path) -> None:
    recorder, out = open_recorder(tmp_path, total_steps=None, total_tokens=640)
    recorder.step(record(10))
    recorder.close()
    assert out.getvalue().startswith("step 10 | loss")


def test_ranks_other_than_the_first_write_nothing(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, config("offline"), Peers(rank=1, world_size=2), 0)
    recorder.step(record(1))
    recorder.event("stopped", step=1)
    recorder.sample(1, "text")
    recorder.say("text")
    recorder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    for start, end in ((0, 7), (5, 9)):
        recorder, _ = open_recorder(tmp_path, resume_step=start)
        for step in range(start + 1, end + 1):
            recorder.step(record(step))
        recorder.event("stopped", step=end)
        recorder.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == list(range(1, 10))
    assert [line["step"] for line in read_jsonl(tmp_path / "events.jsonl")] == [7, 9]


def test_samples_are_kept_and_shown(tmp_path: Path) -> None:
    recorder, out = open_recorder(tmp_path)
    recorder.sample(20, "def f(x):\n    return [x]")
    recorder.close()
    assert "def f(x):\n    return [x]" in out.getvalue()
    (event,) = read_jsonl(tmp_path / "events.jsonl")
    assert (event["kind"], event["step"], event["text"]) == ("sample", 20, "def f(x):\n    return [x]")


def test_a_sample_cannot_command_the_terminal(tmp_path: Path) -> None:
    recorder, out = open_recorder(tmp_path)
    recorder.sample(1, "a\x1b[2J\x08b\x7f\té\n\x9b")
    recorder.close()
    assert "a\\x1b[2J\\x08b\\x7f" in out.getvalue() and "é" in out.getvalue()
    assert not set("\x1b\x08\x7f\x9b") & set(out.getvalue())


def test_what_was_not_measured_has_no_key_and_what_is_not_finite_is_null() -> None:
    line = to_line(record(1, loss=float("nan"), grad_norm=float("inf"), lr=None, layers={}))
    assert line == {"step": 1, "tokens": 64, "loss": None, "grad_norm": None, "tokens_per_s": 1234.5}
    json.dumps(line, allow_nan=False)


def test_layers_keep_their_detail() -> None:
    layers = {"layers.3": {"load_max": 2.0, "bias_min": None, "violation": 1.0}}
    assert to_line(record(1, layers=layers))["layers"] == {"layers.3": {"load_max": 2.0, "violation": 1.0}}


def test_a_key_that_nobody_described_is_refused() -> None:
    with pytest.raises(AssertionError, match="surprise"):
        to_line(record(1, surprise=1))


def test_every_key_that_other_tools_rely_on_is_described() -> None:
    promised = (
        "step tokens loss loss_mtp loss_balance grad_norm lr tokens_per_s step_s bubble_fraction "
        "exposed_comm_fraction comm_bytes_inter comm_bytes_intra max_violation layers val_loss val_bpb"
    )
    assert set(promised.split()) <= set(KEYS)
    assert all(all(metric) for metric in METRICS.values())
