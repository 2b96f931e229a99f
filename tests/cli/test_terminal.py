"""A whole run on a pseudo-terminal through the real launcher, with a restart in the middle."""

import os
import pty
import re
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest

from tests.cli.small_run import ROOT, steps_done, write_config

pytestmark = [pytest.mark.launcher, pytest.mark.slow]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(columns: int, *arguments: str) -> tuple[int, str]:
    """Exit code of the launcher and all that a terminal of so many columns got."""
    pid, ours = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "TERM": "xterm-256color"}
        command = [sys.executable, "-m", "moe_runtime.cli.launch", *arguments]
        os.execve(command[0], command, environment)
    ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    text = b""
    while True:
        try:
            text += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text.decode()


def test_a_terminal_shows_phases_steps_a_restart_and_gets_its_cursor_back(tmp_path: Path) -> None:
    config = write_config(tmp_path, metrics={"wandb": "offline"})
    code, text = on_terminal(100, "train", str(config), "--inject", "sigkill:rank0:step5:forward")
    lines = [line.strip() for line in re.split(r"[\r\n]+", _CONTROL.sub("", text)) if line.strip()]
    assert code == 0, "\n".join(lines)
    assert steps_done(tmp_path / "runs" / "small") == list(range(1, 9))
    assert lines[0] == f"starting 2 processes for {tmp_path}/runs/small"
    shown = "\n".join(lines)
    for phase in ("loading libraries", "building the model", "first step: kernels", "finishing"):
        assert phase in shown, phase
    assert "attempt 1 failed after step 4: rank 0 was ended by SIGKILL" in shown
    assert "attempt 2 begins" in shown and "attempt 2 | step 8/8" in shown
    # What was hidden is shown again; the killed rank's cursor by the launcher.
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
    assert text.index("\x1b[?25h") < text.index("attempt 2 begins")
    assert [line for line in lines if "━" in line and len(line) > 100] == []
