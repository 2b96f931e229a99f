"""Completion: what it offers where, and that bash, zsh and fish put it into the line."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer

from moe_runtime.cli.app import app
from moe_runtime.cli.completion.command import split_line
from moe_runtime.cli.completion.engine import complete
from moe_runtime.cli.completion.scripts import SCRIPTS
from moe_runtime.cli.completion.values import _KINDS
from moe_runtime.config.load import dump_config, load_config
from moe_runtime.errors import ConfigError
from tests.cli.small_run import ROOT


def offered(line: str) -> list[str]:
    """The words that are offered at the end of a line."""
    words = split_line(line)[1:]
    return [one.word for one in complete(app, words[:-1], words[-1])]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with two runs, prepared data and a few files."""
    for name in ("first", "second"):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(dump_config(load_config("quickstart", [f"name={name}"])))
    (tmp_path / "data/mine").mkdir(parents=True)
    (tmp_path / "data/mine/manifest.json").write_text("{}")
    (tmp_path / "own.yaml").write_text("bases: [run/quickstart.yaml]\n")
    (tmp_path / "own text.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("moe-runtime tra", ["train"]),
        ("moe-runtime checkpoint p", ["prune"]),
        ("moe-runtime nothing ", []),
        ("moe-runtime train quicks", ["quickstart", "quickstart_deep"]),
        ("moe-runtime train runs/f", ["runs/first"]),
        ("moe-runtime train o", ["own.yaml"]),
        ("moe-runtime train quickstart optim.n", ["optim.numerics."]),
        ("moe-runtime train quickstart optim.numerics.w", ["optim.numerics.warn."]),
        ("moe-runtime train quickstart optim.numerics.e", ["optim.numerics.every="]),
        ("moe-runtime train quickstart peak_l", ["optim.peak_lr="]),
        (
            "moe-runtime train quickstart seed=1 layout.schedule=dual",
            ["layout.schedule=dualpipe", "layout.schedule=dualpipev"],
        ),
        ("moe-runtime train quickstart recompute.norm=", ["recompute.norm=true", "recompute.norm=false"]),
        ("moe-runtime train quickstart seed=1 optim.peak_lr=", ["optim.peak_lr=0.003"]),
        ("moe-runtime train own.yaml optim.betas=", ["optim.betas=[0.9, 0.95]"]),
        ("moe-runtime train --fresh quickstart no_such_key=", []),
        ("moe-runtime train --inject x quicks", ["quickstart", "quickstart_deep"]),
        ("moe-runtime train --fr", ["--fresh"]),
        ("moe-runtime train --fresh --fr", []),
        ("moe-runtime plan --cluster h1", ["h100"]),
        ("moe-runtime plan --cluster=h1", ["--cluster=h100"]),
        ("moe-runtime generate ", ["runs/first", "runs/second"]),
        ("moe-runtime generate runs/first --dtype ", ["fp32", "bf16"]),
        ("moe-runtime eval runs/first --data ", ["data/mine"]),
        ("moe-runtime schedule zb", ["zb1p", "zbv"]),
        ("moe-runtime prepare --source bu", ["builtin:stdlib"]),
        ("moe-runtime prepare --source own", ["own text.txt", "own.yaml"]),
        ("moe-runtime config diff quickstart seed=1 sm", ["small"]),
        ("moe-runtime config diff quickstart se", ["seed="]),
        ("moe-runtime config keys recompute.", ["recompute.norm", "recompute.swiglu", "recompute.mla_up"]),
        ("moe-runtime completion z", ["zsh"]),
        ("./launch.sh --nproc 2 tra", ["train"]),
        ("./launch.sh --slurm --nnodes 2 train quicks", ["quickstart", "quickstart_deep"]),
        ("./launch.sh --np", ["--nproc"]),
        ("moe-runtime launch --mp", ["--mpi"]),
        ("moe-runtime launch --nproc 2 train quicks", ["quickstart", "quickstart_deep"]),
        ("moe-runtime train 'own text' se", ["seed="]),
    ],
)
def test_what_may_follow_is_offered(line: str, words: list[str]) -> None:
    assert offered(line) == words


def test_every_command_is_offered_and_the_one_that_shells_call_is_not() -> None:
    root = typer.main.get_command(app)
    assert offered("moe-runtime ") == root.list_commands(None)  # type: ignore[attr-defined]
    assert "complete" not in offered("moe-runtime c")


def test_every_kind_of_value_belongs_to_a_parameter_that_there_is() -> None:
    root = typer.main.get_command(app)
    names: set[str] = set()

    def walk(node: object, path: list[str]) -> None:
        if hasattr(node, "list_commands"):
            for name in node.list_commands(None):
                walk(node.get_command(None, name), [*path, name])
        else:
            for one in node.params:  # type: ignore[attr-defined]
                names.update((one.name, f"{path[-1]} {one.name}"))

    walk(root, [])
    assert set(_KINDS) <= names


def test_completion_imports_neither_torch_nor_numpy() -> None:
    program = (
        "import sys; from moe_runtime.cli.app import app;"
        "from moe_runtime.cli.completion.engine import complete;"
        "found = complete(app, ['train', 'quickstart'], 'optim.peak_lr=');"
        "assert found, found; print([name for name in ('torch', 'numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("shell", SCRIPTS)
def test_installing_writes_what_the_shell_loads_once(
    shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moe_runtime.cli.completion.command import completion

    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", f"/bin/{shell}")
    (tmp_path / ".bashrc").write_text("alias x=y")
    completion(None, install=True)
    completion(None, install=True)
    written = [file for file in tmp_path.rglob("*") if file.is_file() and file.read_text() == SCRIPTS[shell]]
    assert len(written) == 1
    if shell != "fish":
        lines = (tmp_path / f".{shell}rc").read_text().splitlines()
        assert len([line for line in lines if str(written[0]) in line]) == 1
    assert (tmp_path / ".bashrc").read_text().startswith("alias x=y\n" if shell == "bash" else "alias x=y")


def test_another_shell_is_refused_with_those_that_there_are() -> None:
    from moe_runtime.cli.completion.command import completion

    with pytest.raises(ConfigError, match="got zhs; did you mean zsh"):
        completion("zhs")


_START = {
    "bash": ["bash", "--norc", "--noprofile", "-i"],
    "zsh": ["zsh", "-f", "-i"],
    "fish": ["fish", "--no-config", "-i"],
}
_LOAD = {
    "bash": "bind 'set enable-bracketed-paste off'; . {script}; echo loa''ded\n",
    "zsh": "autoload -Uz compinit; compinit -u -d {folder}/zcompdump; . {script}; echo loa''ded\n",
    "fish": "source {script}; echo loa''ded\n",
}


class _Terminal:
    """A shell on a terminal of its own."""

    def __init__(self, shell: str, folder: Path) -> None:
        script = folder / f"completion.{shell}"
        script.write_text(SCRIPTS[shell])
        command = folder / "bin" / "moe-runtime"
        command.parent.mkdir()
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m moe_runtime "$@"\n')
        command.chmod(0o755)
        environment = os.environ | {
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'comm'}",
            "TERM": "dumb",
            "HOME": str(folder),
        }
        self.screen = ""
        master, slave = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *_START[shell]],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=ROOT,
        )
        os.close(slave)
        self._master = master
        self.type(_LOAD[shell].format(script=script, folder=folder))
        self.wait_for("loaded")

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, wanted: str, timeout_s: float = 60.0) -> str:
        """Reads until something stands on the screen; returns all that stands there."""
        end = time.monotonic() + timeout_s
        while not re.search(wanted, self.screen):
            left = end - time.monotonic()
            assert left > 0, f"{wanted!r} never came:\n{self.screen}"
            if select.select([self._master], [], [], min(left, 1.0))[0]:
                self.screen += os.read(self._master, 65536).decode(errors="replace")
        return self.screen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.mark.parametrize(
    "shell",
    ["bash", pytest.param("zsh", marks=pytest.mark.slow), pytest.param("fish", marks=pytest.mark.slow)],
)
def test_a_shell_completes_keys_and_values_of_overrides(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    terminal = _Terminal(shell, tmp_path)
    try:
        # A terminal shows what is new alone: waited for is what has not been typed.
        terminal.type("moe-runtime train quickstart layout.sch\t")
        terminal.wait_for("edule=")
        terminal.type("inter\t")
        terminal.wait_for("leaved")
    finally:
        terminal.close()
