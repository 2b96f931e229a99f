"""launch.sh on a machine that has only what a test puts there: a few tools and a Python that takes notes."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.small_run import ROOT

pytestmark = pytest.mark.launcher

_TOOLS = (
    "bash",
    "basename",
    "cat",
    "chmod",
    "cksum",
    "cp",
    "dirname",
    "env",
    "grep",
    "mkdir",
    "readlink",
    "rm",
)
# Notes every call, and does what launch.sh needs of the real one: makes a venv that holds a copy of itself.
_PYTHON = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$NOTES"
case "$*" in
  --version) echo "Python ${VERSION:-3.12.1}" ;;
  "-c "*) [[ -z ${VERSION:-} ]] ;;
  "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install"*torch==*) [[ -z ${NO_TORCH:-} ]] ;;
  "-m pip install"*) [[ -z ${SLOW_PIP:-} ]] || read -r -t 30 <>"$SLOW_PIP" || true ;;
  *) printf 'ran:'; printf ' <%s>' "$@"; echo ;;
esac
"""


class Machine:
    """A folder with launch.sh and what it reads, and a PATH of few tools."""

    def __init__(self, folder: Path, python: str | None = "python3") -> None:
        self.folder, self.tools, self.repository = folder, folder / "bin", folder / "a repository"
        self.tools.mkdir()
        self.repository.mkdir()
        for tool in _TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.tools / tool).symlink_to(found)
        for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.repository)
        if python:
            (self.tools / python).write_text(_PYTHON)
            (self.tools / python).chmod(0o755)

    def environment(self, **variables: str) -> dict[str, str]:
        return {"PATH": str(self.tools), "NOTES": str(self.folder / "notes"), **variables}

    def launch(self, *arguments: str, script: Path | None = None, **variables: str) -> tuple[int, str, str]:
        """Runs the script from another folder: exit code, output, what went to stderr."""
        done = subprocess.run(
            [str(script or self.repository / "launch.sh"), *arguments],
            cwd=self.folder,
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    def notes(self) -> list[str]:
        """The calls of Python since the last look."""
        path = self.folder / "notes"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def installs(self) -> list[str]:
        """The pip installs since the last look."""
        return [note for note in self.notes() if "-m pip install" in note]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_scripts_are_shellcheck_clean() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", ROOT / "launch.sh", ROOT / ".ci/run"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({}, "python3: expected Python 3.11 or newer, found none; install one, or set PYTHON to one"),
        ({"PYTHON": "/no/python"}, "/no/python: expected Python 3.11 or newer, found none"),
    ],
)
def test_without_python_it_says_what_it_needs(tmp_path: Path, variables: dict, says: str) -> None:
    code, output, errors = Machine(tmp_path, python=None).launch("config", "schema", **variables)
    assert (code, output) == (2, "") and errors.startswith(f"launch.sh: {says}") and errors.count("\n") == 1


def test_an_old_python_is_named_with_its_version(machine: Machine) -> None:
    code, _, errors = machine.launch(VERSION="3.10.4")
    assert code == 2 and "expected Python 3.11 or newer, found Python 3.10.4" in errors


def test_a_newer_python_under_another_name_is_found(tmp_path: Path) -> None:
    machine = Machine(tmp_path, python="python3.12")
    assert machine.launch("config", "schema")[0] == 0
    assert any(note.startswith("python3.12 -m venv") for note in machine.notes())


def test_torch_is_installed_first_from_its_own_index_and_the_rest_under_constraints(machine: Machine) -> None:
    code, output, errors = machine.launch("config", "show", TORCH_INDEX_URL="https://torch.example/cpu")
    assert code == 0 and output == "ran: <-m> <moe_runtime.cli.launch> <config> <show>\n"
    first, second = machine.installs()
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")
    )
    assert first == f"python -m pip install --quiet --index-url https://torch.example/cpu {torch}"
    root = machine.repository
    extras = "[data,test,mpi,report,dashboard]"
    assert second == f"python -m pip install --quiet -c {root}/constraints.txt -e {root}{extras}"
    assert "making .venv with Python 3.12.1" in errors


def test_without_an_index_torch_comes_from_the_usual_one(machine: Machine) -> None:
    machine.launch("help")
    assert "--index-url" not in machine.installs()[0]


def test_the_second_call_installs_nothing_and_starts_at_once(machine: Machine) -> None:
    machine.launch("help")
    machine.notes()
    begin = time.monotonic()
    assert machine.launch("help") == (0, "ran: <-m> <moe_runtime> <--help>\n", "")
    assert time.monotonic() - begin < 2
    assert machine.notes() == ["python -m moe_runtime --help"]


def test_a_failed_install_is_told_and_done_again(machine: Machine) -> None:
    code, output, errors = machine.launch("help", NO_TORCH="1")
    assert (code, output) == (2, "") and "pip could not install torch==" in errors
    assert len(machine.installs()) == 1
    assert machine.launch("help")[0] == 0
    assert len(machine.installs()) == 2


def _launch_and_kill(machine: Machine) -> None:
    """Starts a set-up and kills everything while pip is at work."""
    gate = machine.folder / "gate"
    os.mkfifo(gate)
    process = subprocess.Popen(
        [machine.repository / "launch.sh", "help"],
        env=machine.environment(SLOW_PIP=str(gate)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 20
    while "[data,test,mpi,report,dashboard]" not in "".join(machine.notes()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_an_install_that_was_killed_is_done_again(machine: Machine) -> None:
    _launch_and_kill(machine)
    assert machine.launch("help")[0] == 0
    assert len(machine.installs()) == 2


def test_a_killed_update_is_done_again_even_if_its_cause_is_taken_back(machine: Machine) -> None:
    machine.launch("help")
    constraints = machine.repository / "constraints.txt"
    before = constraints.read_text()
    constraints.write_text(before + "# changed\n")
    machine.notes()
    _launch_and_kill(machine)
    constraints.write_text(before)
    assert machine.launch("help")[0] == 0
    assert len(machine.installs()) == 2


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml"])
def test_changed_requirements_are_installed(machine: Machine, name: str) -> None:
    machine.launch("help")
    machine.notes()
    with (machine.repository / name).open("a") as file:
        file.write("# changed\n")
    assert machine.launch("help")[0] == 0
    assert len(machine.installs()) == 2


def test_a_moved_repository_is_installed_again_where_it_is_now(machine: Machine) -> None:
    machine.launch("help")
    machine.notes()
    moved = machine.repository.rename(machine.folder / "moved")
    assert machine.launch("help", script=moved / "launch.sh")[0] == 0
    assert machine.installs()[1].endswith(f"-e {moved}[data,test,mpi,report,dashboard]")


def test_a_link_to_the_script_finds_the_repository(machine: Machine) -> None:
    (machine.folder / "links").mkdir()
    link = machine.folder / "links" / "go"
    link.symlink_to("../a repository/launch.sh")
    code, output, _ = machine.launch(script=link)
    quickstart = machine.repository / "configs/run/quickstart.yaml"
    assert (code, output) == (0, f"ran: <-m> <moe_runtime.cli.launch> <train> <{quickstart}>\n")
    assert (machine.repository / ".venv").is_dir()


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (["generate", "--prompt", "a b"], "<-m> <moe_runtime.cli.launch> <generate> <--prompt> <a b>"),
        (
            ["--nnodes=2", "--node-rank", "1", "train", "x", "a.b=[1, 2]"],
            "<-m> <moe_runtime.cli.launch> <--nnodes=2> <--node-rank> <1> <train> <x> <a.b=[1, 2]>",
        ),
        (["test", "-k", "x y"], "<-m> <pytest> <-m> <not slow> <-k> <x y>"),
        (["test", "--all", "-x"], "<-m> <pytest> <-x>"),
        (["test", "--all"], "<-m> <pytest>"),
        (["train", "--help"], "<-m> <moe_runtime.cli.launch> <train> <--help>"),
    ],
)
def test_arguments_pass_through_as_they_are(machine: Machine, arguments: list[str], ran: str) -> None:
    assert machine.launch(*arguments)[:2] == (0, f"ran: {ran}\n")


@pytest.mark.parametrize("arguments", [["--bogus"], ["-x", "train"], ["--nnodes"], ["--master"]])
def test_a_wrong_option_is_refused_before_anything_is_installed(
    machine: Machine, arguments: list[str]
) -> None:
    code, output, errors = machine.launch(*arguments)
    assert (code, output) == (2, "") and errors.startswith("launch.sh: ") and errors.count("\n") == 1
    assert machine.notes() == []
