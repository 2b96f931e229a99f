"""Ranks that mpiexec, Slurm, torchrun or deepspeed start, here and on two machines: the same bits.

Machines are network namespaces; Slurm and ssh are stand-ins that really start what they are told to.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_runtime.cli.testbed import links
from moe_runtime.errors import ConfigError
from tests.cli import stand_in_slurm
from tests.cli.small_run import ROOT, digests, run, start, steps_done, wait_for_step, write_config
from tests.mpi_ranks import find_mpiexec, why_no_mpi

pytestmark = pytest.mark.launcher

_STEPS = 4
_PORT = 29_523
_LAYOUT = {"pp": 1, "dp": 2, "ep": 2}
_RANK = [sys.executable, "-m", "moe_runtime"]


def _environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | more


def _config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    return write_config(folder, train__total_steps=_STEPS, train__eval_every=0, layout=_LAYOUT, **changes)


def _finish(commands: list[list[str]], **more: str) -> str:
    """Run programs side by side to a good end; gives what they said."""
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environment(**more),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command in commands
    ]
    said = [process.communicate(timeout=180)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(said)
    return "\n".join(said)


_needs_mpi = pytest.mark.skipif(why_no_mpi() is not None, reason=why_no_mpi() or "")


@pytest.mark.mpi
@_needs_mpi
def test_mpiexec_starts_a_training_and_only_rank_0_speaks(tmp_path: Path) -> None:
    config = write_config(tmp_path, train__total_steps=2, train__eval_every=0)
    code, output = run("--mpi", "train", str(config))
    assert code == 0 and output.count("step 2/2") == 1, output
    assert steps_done(tmp_path / "runs" / "small") == [1, 2]


@pytest.mark.mpi
@pytest.mark.slow
@_needs_mpi
def test_plain_mpiexec_trains_four_ranks_to_the_bits_of_our_launcher(tmp_path: Path) -> None:
    mpiexec, layout = str(find_mpiexec()), {"pp": 2, "dp": 2, "ep": 2, "schedule": "dualpipe"}
    changes = {"train__total_steps": _STEPS, "batch": {"seq_len": 32, "global_batch_size": 8}}
    (tmp_path / "ours").mkdir(), (tmp_path / "mpi").mkdir()
    ours = write_config(tmp_path / "ours", layout=layout, **changes)
    code, output = run("train", str(ours))
    assert code == 0, output
    theirs = write_config(tmp_path / "mpi", layout=layout, **changes)
    said = _finish([[mpiexec, "-n", "4", *_RANK, "train", str(theirs)]])
    assert said.count(f"step {_STEPS}/{_STEPS}") == 1, said
    found = [digests(tmp_path / name / "runs" / "small", _STEPS) for name in ("ours", "mpi")]
    assert found[0] == found[1]


@pytest.mark.mpi
@pytest.mark.slow
@_needs_mpi
def test_a_mistake_under_mpiexec_is_told_once_and_sigterm_saves(tmp_path: Path) -> None:
    mpiexec, config = str(find_mpiexec()), _config(tmp_path)
    done = subprocess.run(
        [mpiexec, "-n", "3", *_RANK, "train", str(config)],
        env=_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # mpiexec kills the others, and may give the code of that.
    assert done.returncode and done.stderr == "layout: pp 1 x dp 2 needs 2 processes, got 3; start 2\n"
    process = start("--mpi", "train", str(config), "train.total_steps=10000")
    wait_for_step(tmp_path / "runs" / "small", 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "the same command continues" in output, output
    step = steps_done(tmp_path / "runs" / "small")[-1]
    assert (tmp_path / "runs/small/checkpoints" / f"step_{step:08d}").is_dir()


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of the run on one machine, by our launcher."""
    folder = tmp_path_factory.mktemp("clean")
    code, output = run("train", str(_config(folder)))
    assert code == 0, output
    return digests(folder / "runs" / "small", _STEPS)


@pytest.fixture
def machines() -> Iterator[links.Testbed]:
    """Two of them."""
    try:
        links.require_tools()
    except ConfigError as error:
        pytest.skip(str(error))
    with links.open_testbed(2, None) as testbed:
        yield testbed


def _by_torchrun(machines: links.Testbed, folder: Path, command: list[str]) -> str:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meeting = ["--master-addr=10.83.0.1", f"--master-port={_PORT}"]
    rank = ["-m", "moe_runtime", *command]
    return _finish(
        [[*machines.inside(node), *torchrun, f"--node-rank={node}", *meeting, *rank] for node in (0, 1)]
    )


def _hostfile(folder: Path) -> Path:
    path = folder / "hosts"
    path.write_text("10.83.0.1 slots=1\n10.83.0.2 slots=1\n")
    return path


def _by_deepspeed(machines: links.Testbed, folder: Path, command: list[str]) -> str:
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={_hostfile(folder)}"]
    meeting = ["--master_addr=10.83.0.1", f"--master_port={_PORT}", "--module", "moe_runtime"]
    return _finish(
        [
            [*machines.inside(node), *deepspeed, "--no_ssh", f"--node_rank={node}", *meeting, *command]
            for node in (0, 1)
        ]
    )


def _by_hostfile(machines: links.Testbed, folder: Path, command: list[str]) -> str:
    launcher = [sys.executable, "-m", "moe_runtime", "launch", "--hostfile", str(_hostfile(folder))]
    return _finish(
        [[*machines.inside(node), *launcher, "--node-rank", str(node), *command] for node in (0, 1)]
    )


def _by_mpiexec(machines: links.Testbed, folder: Path, command: list[str]) -> str:
    if why_no_mpi() is not None:
        pytest.skip(str(why_no_mpi()))
    inside = [" ".join(machines.inside(node)) for node in (0, 1)]
    ssh = folder / "ssh"
    ssh.write_text(
        "#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nhost=$1 && shift\ncase $host in\n"
        + "".join(f'10.83.0.{node + 1}) exec {inside[node]} sh -c "$*" ;;\n' for node in (0, 1))
        + "esac\n"
    )
    ssh.chmod(0o755)
    # mpiexec itself is on machine 0, from where it reaches both.
    launcher = [*_RANK, "launch", "--mpi", "--hostfile", str(_hostfile(folder))]
    hydra = {"HYDRA_LAUNCHER_EXEC": str(ssh), "HYDRA_IFACE": links.INTERFACE}
    return _finish([[*machines.inside(0), *launcher, *command]], **hydra)


def _slurm(machines: links.Testbed, folder: Path) -> dict[str, str]:
    nodes = {f"10.83.0.{node + 1}": machines.inside(node) for node in (0, 1)}
    return stand_in_slurm.install(folder / "slurm", nodes)


def _by_srun(machines: links.Testbed, folder: Path, command: list[str]) -> str:
    return _finish([["srun", "--ntasks-per-node=1", *_RANK, *command]], **_slurm(machines, folder))


def _batch_file(folder: Path, command: list[str]) -> Path:
    printed = subprocess.run(
        [*_RANK, "launch", "--slurm", "--nnodes", "2", *command],
        env=_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    path = folder / "job.sbatch"
    path.write_text(printed.stdout)
    return path


def _by_sbatch(machines: links.Testbed, folder: Path, command: list[str]) -> str:
    return _finish([["bash", str(_batch_file(folder, command))]], **_slurm(machines, folder))


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch", [_by_torchrun, _by_deepspeed, _by_hostfile, _by_mpiexec, _by_srun, _by_sbatch]
)
def test_two_machines_train_to_the_same_bits_whoever_starts_the_ranks(
    launch: Callable, machines: links.Testbed, clean: dict[str, str], tmp_path: Path
) -> None:
    config = _config(tmp_path)
    said = launch(machines, tmp_path, ["train", str(config)])
    assert said.count(f"step {_STEPS}/{_STEPS}") == 1, said
    assert digests(tmp_path / "runs" / "small", _STEPS) == clean
    traffic = json.loads((tmp_path / "runs/small/metrics.jsonl").read_text().splitlines()[-1])
    assert traffic["comm_bytes_inter"] > 0  # the ranks know that they are on two machines


@pytest.mark.slow
def test_a_job_of_slurm_that_runs_out_of_time_saves_and_is_queued_again(
    machines: links.Testbed, clean: dict[str, str], tmp_path: Path
) -> None:
    run_dir, config = tmp_path / "runs" / "small", _config(tmp_path)
    job, variables = _batch_file(tmp_path, ["train", str(config)]), _slurm(machines, tmp_path)
    slow = job.with_name("slow.sbatch")  # long enough to be interrupted
    slow.write_text(job.read_text().replace(str(config), f"{config} train.total_steps=100000"))
    batch = subprocess.Popen(
        ["bash", str(slow)],
        env=_environment(**variables),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for_step(run_dir, 2, batch)
    # Slurm tells the tasks of a step, not the shell.
    (srun,) = subprocess.run(["pgrep", "-P", str(batch.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(srun), signal.SIGTERM)
    output, _ = batch.communicate(timeout=120)
    assert batch.returncode == 0, output
    assert stand_in_slurm.notes(tmp_path / "slurm") == ["requeue 4711"]
    stopped = steps_done(run_dir)[-1]
    longer = f"{config} train.total_steps={stopped + 1}"
    slow.write_text(job.read_text().replace(str(config), longer))
    said = _finish([["bash", str(slow)]], **variables)
    assert f"step {stopped + 1}/{stopped + 1}" in said
    assert stand_in_slurm.notes(tmp_path / "slurm") == ["requeue 4711"]
