"""What carries tensors between ranks: torch with gloo and NCCL, and MPI; tried in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from moe_runtime.cli.doctor.finding import Finding, ok
from moe_runtime.cli.network import loopback_name

PATIENCE_S = 8.0
_MPI_PROGRAM = """
from mpi4py import MPI
print(MPI.COMM_WORLD.allreduce(MPI.COMM_WORLD.rank + 1), MPI.Get_library_version())
"""
_CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


def look_at_torch() -> Iterator[Finding]:
    """Findings about torch, GPUs, gloo and NCCL."""
    environment = dict(os.environ)
    interface = loopback_name()
    if interface is not None:  # as our launcher does it
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "moe_runtime.cli.doctor.torch_probe", folder]
        code, said, errors = run(command, environment)
    line = next((line for line in reversed(said.splitlines()) if line.startswith("{")), None)
    if line is None:
        why = "no answer within 8 s" if code is None else _last_line(errors) or f"exit code {code}"
        yield Finding(
            "torch", "fail", f"expected to import it, got: {why}", "pip install 'torch>=2.11,<2.14'"
        )
        return
    found = json.loads(line)
    yield ok("torch", f"{found['torch']}, CUDA {found['cuda_build'] or 'none'}")
    yield _devices(found)
    yield _gloo(found)
    if found["gpus"]:
        yield _nccl(found)


def _devices(found: dict[str, Any]) -> Finding:
    if found["gpus"]:
        names = sorted(set(found["gpus"]))
        return ok("devices", f"{len(found['gpus'])} GPUs: {', '.join(names)}")
    if shutil.which("nvidia-smi") is None:
        return ok("devices", "no GPU; runs use the CPU")
    if found["cuda_build"] is None:
        said = "nvidia-smi is here, and torch was built without CUDA"
        return Finding(
            "devices", "warn", said, f"pip install --force-reinstall torch --index-url {_CUDA_INDEX}"
        )
    return Finding("devices", "note", "torch can use no GPU, though nvidia-smi is here", "nvidia-smi")


def _gloo(found: dict[str, Any]) -> Finding:
    if found["gloo"] == "joined":
        return ok("gloo", "two ranks met and added up a number")
    if found["gloo"] is None:
        return ok("gloo", "in torch; not tried, for GPUs use NCCL")
    mend = "unset GLOO_SOCKET_IFNAME" if "GLOO_SOCKET_IFNAME" in os.environ else "ip link set lo up"
    return Finding("gloo", "fail", f"expected two ranks to meet, got: {found['gloo']}", mend)


def _nccl(found: dict[str, Any]) -> Finding:
    if found["nccl"]:
        return ok("NCCL", f"{found['nccl']}; not tried, for that a run of several GPUs is needed")
    said = "not in this build of torch: GPUs could not exchange"
    return Finding("NCCL", "fail", said, f"pip install --force-reinstall torch --index-url {_CUDA_INDEX}")


def look_at_mpi() -> Iterator[Finding]:
    """Whether mpiexec starts ranks that mpi4py joins."""
    beside = os.path.dirname(sys.executable)
    path = os.pathsep.join((beside, os.environ.get("PATH", "")))
    program = shutil.which("mpiexec", path=path)
    if program is None or find_spec("mpi4py") is None:
        lacks = "mpiexec" if program is None else "mpi4py"
        yield Finding(
            "MPI", "note", f"no {lacks}: ranks cannot be started with it", "pip install 'moe_runtime[mpi]'"
        )
        return
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    code, said, errors = run(
        [program, "-n", "2", sys.executable, "-c", _MPI_PROGRAM], environment | {"PATH": path}
    )
    answers = [line for line in said.splitlines() if line.startswith("3 ")]
    if code == 0 and len(answers) == 2:
        library = " ".join(answers[0].split()[1:4]).rstrip(",")
        yield ok("MPI", f"{program}: two ranks met and added up a number, {library}")
        return
    why = f"no answer within {PATIENCE_S:g} s" if code is None else _last_line(errors) or _last_line(said)
    alone = "each rank was alone: mpiexec and mpi4py are of different MPIs" if code == 0 else why
    mend = "pip install --force-reinstall mpi4py mpich"
    yield Finding("MPI", "warn", f"{program}: expected two ranks to meet, got: {alone}", mend)


def run(command: list[str], environment: dict[str, str]) -> tuple[int | None, str, str]:
    """Exit code, standard output and errors of a program; None: it was ended, with all that it started."""
    try:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        return 127, "", str(error)
    try:
        said, errors = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, errors = process.communicate()
        return None, said, errors
    return process.returncode, said, errors


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""
