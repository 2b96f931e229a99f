"""The batch file for Slurm, and the program line of mpiexec."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moe_runtime.cli import launch
from moe_runtime.cli.launchers.mpi import find_mpiexec, mpiexec_command
from moe_runtime.errors import ConfigError


def _printed(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    code = launch.main(["--slurm", *arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ("train", "quickstart"),
            [
                "--nodes=1",
                "--nnodes 1 ",
                "4 processes",
                "--kill-on-bad-exit=1",
                "runs/quickstart/preempted.json",
            ],
        ),
        (("train", "v3_671b"), ["--nodes=256", "--gpus-per-node=8", "--nnodes 256 "]),
        (("--nproc", "4", "train", "v3_16b"), ["--nodes=8", "--gpus-per-node=4", "--nproc 4 "]),
        (("--nnodes", "2", "train", "quickstart"), ["--nodes=2", "2 machines of 2"]),
        (
            ("--nnodes", "2:4", "train", "v3_16b", "layout.dp=8"),
            ["--nodes=2-4", "--nnodes 2:4 ", "#SBATCH --no-kill", "--kill-on-bad-exit=0"],
        ),
    ],
)
def test_a_batch_file_says_what_the_job_takes(
    arguments: tuple[str, ...], lines: list[str], capsys: pytest.CaptureFixture
) -> None:
    if "2:4" in arguments:
        arguments = (*arguments, "layout.ep=4")
    text = _printed(capsys, *arguments)
    assert [line for line in lines if line not in text] == []
    # Every option of sbatch comes before the first command, or Slurm does not read it.
    body = text.index("set -euo pipefail")
    assert all(match.start() < body for match in re.finditer("^#SBATCH", text, re.MULTILINE))


def test_a_batch_file_is_clean_bash_whatever_the_words(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "a folder's"
    folder.mkdir()
    monkeypatch.chdir(folder)
    path = tmp_path / "job"
    path.write_text(_printed(capsys, "train", "quickstart", "optim.betas=[0.9, 0.95]", f"data.path={folder}"))
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    if shutil.which("shellcheck") is not None:
        checked = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
    # The words that srun gets, as bash would split them.
    shown = path.read_text().replace("srun ", "printf '<%s>\\n' ", 1).replace("$(scontrol", "$(echo host; :")
    said = subprocess.run(
        ["bash", "-c", shown],
        capture_output=True,
        text=True,
        env={"SLURM_JOB_NODELIST": "x", "SLURM_JOB_ID": "13", "PATH": "/usr/bin:/bin"},
    )
    assert said.stdout.splitlines()[-6:] == [
        "<--master>",
        "<host:20013>",
        "<train>",
        "<quickstart>",
        "<optim.betas=[0.9, 0.95]>",
        f"<data.path={folder}>",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slurm", "--master", "a:1", "train", "quickstart"), "--master does not go with --slurm"),
        (("--slurm", "train", "quickstart", "--fresh"), "--slurm: expected no --fresh"),
        (("--slurm", "--nnodes", "3", "train", "quickstart"), "--nnodes: expected a divisor of the 4"),
        (("--slurm", "--nproc", "3", "train", "quickstart"), "layout: pp 2 x dp 2 needs 4 processes, got 3"),
        (("--mpi", "--nnodes", "2", "train", "quickstart"), "--nnodes does not go with --mpi"),
        (("--mpi", "--nproc", "3", "train", "quickstart"), "layout: pp 2 x dp 2 needs 4 processes, got 3"),
        (("--mpi", "plan"), "--mpi is for train, the only command of several processes, got plan"),
        (("--hostfile", "h", "--master", "a:1", "train", "quickstart"), "expected --node-rank too"),
    ],
)
def test_a_wrong_way_to_start_ranks_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture
) -> None:
    assert launch.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and says in said.err


@pytest.mark.parametrize(
    ("version", "options"),
    [
        ("HYDRA build details:", ["-hosts", "a:2,b:2"]),
        (
            "mpiexec (Open MPI) 5.0.11",
            ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "--host", "a:2,b:2"],
        ),
    ],
)
def test_each_mpiexec_is_told_the_machines_in_its_own_words(
    version: str, options: list[str], tmp_path: Path
) -> None:
    program = tmp_path / "mpiexec"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    line = mpiexec_command(str(program), 4, {"a": 2, "b": 2}, ["train", "x"])
    assert (
        line[1:3] == ["-n", "4"]
        and line[3:-5] == options
        and line[-4:] == ["-m", "moe_runtime", "train", "x"]
    )


def test_an_mpiexec_that_is_not_there_is_told_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MPIEXEC", "/no/mpiexec")
    with pytest.raises(ConfigError, match="--mpi: expected the program /no/mpiexec, found none; install"):
        find_mpiexec()


def test_a_hostfile_without_ssh_needs_the_number_of_a_machine_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.2 slots=2\n127.0.0.3 slots=2\n")
    assert launch.main(["--hostfile", str(hosts), "--node-rank", "2", "train", "quickstart"]) == 2
    assert "--node-rank: expected 0 to 1, a host of the file, got 2" in capsys.readouterr().err
    other = ["--node-rank", "1", "--master", "no-such-host.invalid:1"]
    assert launch.main(["--hostfile", str(hosts), *other, "train", "quickstart"]) == 2
    assert "--hostfile: no-such-host.invalid has no address" in capsys.readouterr().err
