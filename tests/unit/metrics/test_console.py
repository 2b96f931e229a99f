"""What a person sees: on a real terminal (a pseudo-terminal of the kernel) and in a pipe."""

import io
import os
import pty
import re
import struct
import termios
import time
from collections.abc import Callable
from fcntl import ioctl
from typing import Any

import pytest
from rich.console import Console

from moe_runtime.metrics.console import ConsoleSink, clock
from moe_runtime.metrics.phase_lines import PhaseLines
from moe_runtime.metrics.report.shown import unhidden
from moe_runtime.parallel.progress import Progress

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "tokens": step * 64, "loss": 5.0 / step, "tokens_per_s": 1234.5} | more


def on_terminal(columns: int, show: Callable[[ConsoleSink], None]) -> tuple[list[str], str]:
    """Lines that a terminal of so many columns got, control sequences apart, and the raw text."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w") as file:
        environment = {"TERM": "xterm-256color", "COLUMNS": str(columns)}
        sink = ConsoleSink(10, None, 1, Console(file=file, _environ=environment))
        show(sink)
        sink.close()
        file.flush()
        os.set_blocking(ours, False)
        raw = b""
        while True:
            try:
                raw += os.read(ours, 1 << 16)
            except BlockingIOError:
                break
    os.close(ours)
    text = raw.decode()
    return [line.rstrip() for line in re.split(r"[\r\n]+", _CONTROL.sub("", text)) if line.strip()], text


def test_a_terminal_shows_phases_then_steps_with_the_time_left() -> None:
    def show(sink: ConsoleSink) -> None:
        sink.starting("loading libraries")
        sink.starting("")
        for step in (1, 2, 3):
            sink.step(record(step))
        sink.phase("validating")
        sink.say("a message with [brackets]")

    lines, raw = on_terminal(120, show)
    assert any("loading libraries" in line for line in lines)
    assert any(line.split("|")[1].strip().endswith("left") for line in lines if "step 3/10" in line), lines
    assert any("validating | step 3/10" in line for line in lines)
    assert "a message with [brackets]" in lines
    assert raw.count("\x1b[?25l") == raw.count("\x1b[?25h") == 1, "the cursor comes back"
    assert "step 3/10" in lines[-1] and "validating" not in lines[-1]


@pytest.mark.parametrize("columns", [40, 80])
def test_a_narrow_terminal_keeps_the_bar_the_step_and_the_time_left(columns: int) -> None:
    def show(sink: ConsoleSink) -> None:
        for step in range(1, 5):
            sink.step(record(step, grad_norm=1.0, max_violation=2.0))

    lines, _ = on_terminal(columns, show)
    assert all(len(line) <= columns for line in lines), lines
    assert "━" in lines[-1] and "step 4/10 | 0:00 left" in lines[-1]


def test_a_terminal_without_control_sequences_is_treated_as_a_pipe() -> None:
    out = io.StringIO()
    sink = ConsoleSink(
        10, None, 2, Console(file=out, force_terminal=True, _environ={"TERM": "dumb"}, width=200)
    )
    for step in range(1, 5):
        sink.step(record(step))
    sink.close()
    assert [line.split(" | ")[0] for line in out.getvalue().splitlines()] == ["step 2/10", "step 4/10"]


def test_the_phases_of_the_loop_are_followed() -> None:
    sink, progress = ConsoleSink(10, None, 1, Console(file=io.StringIO())), Progress()
    seen: list[str] = []
    sink.phase = seen.append  # type: ignore[method-assign,assignment]
    progress.listeners.append(sink.follow)
    progress.begins_step(1)
    progress.enters("step")
    progress.begins_step(2)
    for phase in ("step", "optimizer", "evaluate", "sample", "save", "end"):
        progress.enters(phase)
    assert seen == [
        "",
        "first step: kernels are compiled and buffers made",
        *[""] * 3,
        "validating",
        "writing a sample",
        "saving a checkpoint",
        "finishing",
    ]


def test_in_a_pipe_a_phase_that_takes_long_is_told_with_how_far_it_is_and_its_end() -> None:
    said: list[str] = []
    lines = PhaseLines(said.append)
    lines.enters("validating", 60.0)  # over before its time
    lines.enters("preparing data", 0.05)
    lines.detail("3.0 of 9.0 MB")
    deadline = time.monotonic() + 10
    while len(said) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    lines.enters("", 0.0)
    lines.close()
    assert said[0] == "preparing data: 3.0 of 9.0 MB, 0 s so far" and said[1].startswith("preparing data")
    assert re.fullmatch(r"preparing data: done after \d+ s", said[-1])
    assert not any("validating" in line for line in said)


def test_preparing_says_amount_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("moe_runtime.metrics.console.time.monotonic", lambda: now[0])

    def show(sink: ConsoleSink) -> None:
        sink.preparing("tokenising", 0, 12_000_000)
        now[0] += 2.0
        sink.preparing("tokenising", 3_000_000, 12_000_000)
        now[0] += 0.01
        sink.preparing("tokenising", 3_100_000, 12_000_000)  # too soon to be shown

    lines, _ = on_terminal(120, show)
    assert any("preparing data, tokenising: 3.0 of 12.0 MB, 1.5 MB/s, 0:06 left" in line for line in lines)
    assert not any("3.1 of" in line for line in lines)


def test_text_of_a_model_cannot_command_a_terminal() -> None:
    assert unhidden("a\x1b[2Jb\tc\n\x9bd\u202e\u2067") == "a\\x1b[2Jb\tc\n\\x9bd\\u202e\\u2067"
    assert (clock(75), clock(3675)) == ("1:15", "1:01:15")
