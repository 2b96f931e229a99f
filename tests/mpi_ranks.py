"""Runs a function on several MPI ranks of this machine, as `tests.ranks` does on gloo ranks.

`mpiexec` starts `python -m tests.mpi_ranks FOLDER` on each rank; what to call and what came of it
are pickled files in the folder. The function must be importable (module level).
"""

import importlib
import importlib.util
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Ended:
    """How an MPI job ended.

    Args:
        code: exit status of mpiexec; None if it ran past its time and was killed.
        stderr: what all ranks wrote there.
        seconds: from start to end.
        values: what the function returned, for ranks where it did.
        tracebacks: for ranks where it raised.
    """

    code: int | None
    stderr: str
    seconds: float
    values: dict[int, Any]
    tracebacks: dict[int, str]


def find_mpiexec() -> str | None:
    """The mpiexec beside this Python, else the one on the path."""
    beside = Path(sys.prefix, "bin", "mpiexec")
    return str(beside) if beside.exists() else shutil.which("mpiexec")


def why_no_mpi() -> str | None:
    """What MPI tests lack here, if anything."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is missing: pip install 'moe_runtime[mpi]'"
    return "mpiexec is missing: pip install 'moe_runtime[mpi]'" if find_mpiexec() is None else None


def run_mpi_ranks(fn: Callable, world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank of a fresh MPI world; results in rank order.

    Raises:
        AssertionError: a rank raised (its traceback is the message), the job failed or took too long.
    """
    ended = launch(fn, world_size, *args, timeout_s=timeout_s)
    for rank, text in ended.tracebacks.items():
        raise AssertionError(f"rank {rank} raised:\n{text}")
    missing = sorted(set(range(world_size)) - set(ended.values))
    assert ended.code == 0, f"exit status {ended.code}, no result of ranks {missing}:\n{ended.stderr}"
    assert not missing, f"no result of ranks {missing}:\n{ended.stderr}"
    return [ended.values[rank] for rank in range(world_size)]


def launch(fn: Callable, world_size: int, *args: Any, timeout_s: float = 60.0) -> Ended:
    """As `run_mpi_ranks`, for a job that may fail: says how it ended."""
    mpiexec = find_mpiexec()
    assert mpiexec is not None, "mpiexec is missing"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "call").write_bytes(pickle.dumps((fn.__module__, fn.__qualname__, args)))
        command = [mpiexec, "-n", str(world_size), sys.executable, "-m", "tests.mpi_ranks", name]
        began = time.monotonic()
        with open(folder / "stderr", "w+") as stderr:
            code = _run(command, stderr, timeout_s)
        seconds = time.monotonic() - began
        results = {int(f.suffix[1:]): pickle.loads(f.read_bytes()) for f in folder.glob("result.*")}
        return Ended(
            code=code,
            stderr=(folder / "stderr").read_text(),
            seconds=seconds,
            values={rank: value for rank, (fine, value) in results.items() if fine},
            tracebacks={rank: value for rank, (fine, value) in results.items() if not fine},
        )


def _run(command: list[str], stderr: Any, timeout_s: float) -> int | None:
    """The exit status, or None after killing everything the command started."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(
        command, cwd=_ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr
    )
    try:
        return job.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if job.poll() is None:
            for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                process.kill()
            job.wait()


def _run_rank(folder: Path) -> None:
    import torch
    from mpi4py import MPI

    torch.set_num_threads(1)
    rank, world_size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    module, function, args = pickle.loads((folder / "call").read_bytes())
    try:
        value = getattr(importlib.import_module(module), function)(rank, world_size, *args)
    except Exception:
        (folder / f"result.{rank}").write_bytes(pickle.dumps((False, traceback.format_exc())))
        raise
    (folder / f"result.{rank}").write_bytes(pickle.dumps((True, value)))


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]))
