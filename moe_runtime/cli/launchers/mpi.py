"""mpiexec starts ranks; MPI itself only tells them where to meet.

Exchanges go over gloo or NCCL as under any other launcher. So MPI is opened for one broadcast and closed
again: a rank may then end as it likes, and nothing of MPI runs beside the training.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from moe_runtime.cli import network
from moe_runtime.errors import ConfigError

_INSTALL = "install the extra: pip install 'moe_runtime[mpi]'"
_BY_HAND = "set MASTER_ADDR and MASTER_PORT for all ranks"


def agree_on_meeting_point(rank: int, world_size: int, per_node: int) -> tuple[str, int]:
    """Address and port of rank 0, as the other machines reach it; collective.

    Raises:
        ConfigError: mpi4py is not installed, or belongs to another MPI than mpiexec.
    """
    try:
        import mpi4py

        mpi4py.rc.initialize = False  # not before we know that it is the right one: a wrong one aborts
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no MPI library that it could load
        raise ConfigError(
            f"mpiexec: ranks meet through mpi4py, which cannot be used here ({error}); {_INSTALL}, "
            f"or {_BY_HAND}"
        ) from error
    library = MPI.Get_library_version().partition(",")[0].partition("\n")[0].strip("\0 ")
    if ("Open MPI" in library) != ("OMPI_COMM_WORLD_RANK" in os.environ):
        raise ConfigError(
            f"mpiexec: expected mpi4py to use the same MPI, got {library}; set MPI4PY_LIBMPI to the "
            f"libmpi.so of this mpiexec, or {_BY_HAND}"
        )
    MPI.Init()
    world = MPI.COMM_WORLD
    if world.Get_size() != world_size:
        raise ConfigError(
            f"mpiexec: expected {world_size} processes, got {world.Get_size()} from mpi4py, which uses "
            f"{library}; set MPI4PY_LIBMPI to the libmpi.so of this mpiexec, or {_BY_HAND}"
        )
    addresses = world.gather(network.own_address(os.environ), root=0)
    said = None
    if rank == 0 and addresses is not None:
        other = next((address for address in addresses[per_node:] if address), None)
        address = "127.0.0.1" if other is None else network.address_towards(other)
        said = (address or addresses[0] or "127.0.0.1", network.free_port())
    point: tuple[str, int] = world.bcast(said, root=0)
    MPI.Finalize()
    return point


def find_mpiexec() -> str:
    """The program of the environment variable MPIEXEC, or beside this Python, or on the path.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sys.prefix, "bin", "mpiexec")
    found = os.environ.get("MPIEXEC") or (str(beside) if beside.exists() else "mpiexec")
    path = shutil.which(found)
    if path is None:
        raise ConfigError(f"--mpi: expected the program {found}, found none; {_INSTALL}")
    return path


def mpiexec_command(mpiexec: str, processes: int, hosts: dict[str, int], command: list[str]) -> list[str]:
    """The program line that starts all ranks.

    Args:
        mpiexec: the program.
        processes: ranks of the run.
        hosts: processes on each machine; empty: all on this one.
        command: arguments of `python -m moe_runtime`.
    """
    listed = ",".join(f"{host}:{slots}" for host, slots in hosts.items())
    if "Open MPI" in _version_of(mpiexec):
        # By itself it refuses more ranks than cores, and binds each to one core.
        options = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", *(["--host", listed] if hosts else [])]
    else:
        options = ["-hosts", listed] if hosts else []
    return [mpiexec, "-n", str(processes), *options, sys.executable, "-m", "moe_runtime", *command]


def _version_of(mpiexec: str) -> str:
    return subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=30).stdout
