"""Which rank this process is, whoever started it.

Our ranks read torch's variables: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
torchrun sets them, the deepspeed launcher too (but for the one on the size of a machine); mpiexec and srun
have words of their own. `claim_rank` translates these, so that nothing above knows of them:

    who started it            its words for the numbers            where ranks meet
    torchrun, our launcher    torch's                              given
    deepspeed                 torch's, LOCAL_SIZE                  given
    mpiexec (Open MPI)        OMPI_COMM_WORLD_*                    rank 0 says it over MPI (`mpi`)
    mpiexec (MPICH, Intel)    PMI_RANK, PMI_SIZE, MPI_LOCAL*       the same
    srun                      SLURM_PROCID, SLURM_STEP_*           first host of the step (`slurm_nodes`)

The order matters: mpiexec inside a Slurm job starts its helpers by srun, so its words count first. A batch
script and an interactive shell of Slurm have SLURM_PROCID as well; they are steps of one task, or of none.

Rejected: reading the size of a job from SLURM_NTASKS, which every shell of a job has; and asking MPI for the
numbers too, which would start it in programs that never need it.
"""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moe_runtime.cli import network
from moe_runtime.cli.launchers import mpi, slurm_nodes
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.heartbeat import STATUS_DIR

_MPI_WORDS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    (
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
)

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """One process of several.

    Args:
        starter: the program that started it, `mpiexec` or `srun`.
        rank, world_size: of all processes.
        local_rank, local_size: on this machine.
        per_node: processes of the fullest machine.
    """

    starter: str
    rank: int
    world_size: int
    local_rank: int
    local_size: int
    per_node: int


def find_place(environ: Mapping[str, str]) -> Place | None:
    """What mpiexec or srun says; None: neither of them started this process, or it is the only one.

    Raises:
        ConfigError: their words are no numbers.
    """
    for names in _MPI_WORDS:
        if all(name in environ for name in names):
            rank, size, local_rank, local_size = (_number(environ, name) for name in names)
            place = Place("mpiexec", rank, size, local_rank, local_size, local_size)
            return place if size > 1 else None
    size = _number(environ, "SLURM_STEP_NUM_TASKS") if "SLURM_STEP_NUM_TASKS" in environ else 1
    if size == 1:
        return None
    per_node = slurm_nodes.tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", str(size)))
    rank, node = _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_NODEID")
    if node >= len(per_node):
        raise ConfigError(f"srun: expected SLURM_NODEID below {len(per_node)}, got {node}")
    return Place("srun", rank, size, _number(environ, "SLURM_LOCALID"), per_node[node], max(per_node))


def rank_here(environ: Mapping[str, str]) -> int | None:
    """The rank of this process, set up or not; None: it is no rank.

    Raises:
        ConfigError: the launcher's words are no numbers.
    """
    if "RANK" in environ:
        return _number(environ, "RANK")
    place = find_place(environ)
    return None if place is None else place.rank


def claim_rank(environ: MutableMapping[str, str] | None = None) -> None:
    """Set torch's variables from those of whoever started this process; before torch is imported.

    Collective where mpiexec started it and MASTER_ADDR is not set.

    Raises:
        ConfigError: the ranks of a machine are not in a row, there is no way to meet, or a number is none.
    """
    environ = os.environ if environ is None else environ
    if STATUS_DIR in environ:  # our own launcher has set everything
        return
    for name in _NUMBERS:
        _number(environ, name, 0)
    if "RANK" in environ:
        _take_deepspeeds_size(environ)
        _name_interface(environ, _number(environ, "LOCAL_WORLD_SIZE", 1))
        return
    place = find_place(environ)
    if place is None:
        return
    environ["RANK"], environ["WORLD_SIZE"] = str(place.rank), str(place.world_size)
    environ["LOCAL_RANK"], environ["LOCAL_WORLD_SIZE"] = str(place.local_rank), str(place.per_node)
    _check_order(place)
    _meet(place, environ)
    _name_interface(environ, place.local_size)
    if place.starter == "srun":
        slurm_nodes.adopt_limits(environ)
    threads = max(1, len(os.sched_getaffinity(0)) // place.local_size)
    environ.setdefault("OMP_NUM_THREADS", str(threads))


def _take_deepspeeds_size(environ: MutableMapping[str, str]) -> None:
    """LOCAL_SIZE is the deepspeed launcher's word; of no use where machines differ, for ranks must agree."""
    words = ("LOCAL_SIZE", "CROSS_SIZE", "WORLD_SIZE")
    if all(name in environ for name in words):
        local, machines, world = (_number(environ, name) for name in words)
        if local * machines == world:
            environ.setdefault("LOCAL_WORLD_SIZE", str(local))


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name, "nothing" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}: expected the whole number of a launcher, got {text}; unset it")
    return int(text)


def _check_order(place: Place) -> None:
    """Experts are laid out over ranks in a row, and so must machines be."""
    is_even = place.starter == "srun" or place.world_size % place.per_node == 0
    if is_even and place.rank % place.per_node == place.local_rank:
        return
    option = "--distribution=block" if place.starter == "srun" else "its default order, by slots"
    raise ConfigError(
        f"{place.starter}: expected the {place.per_node} ranks of a machine in a row, got rank {place.rank} "
        f"as number {place.local_rank} of its machine; start them with {option}, as many on each machine"
    )


def _meet(place: Place, environ: MutableMapping[str, str]) -> None:
    """Where rank 0 will host the store."""
    given = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in environ]
    if len(given) == 1:
        raise ConfigError(f"{given[0]}: expected MASTER_ADDR and MASTER_PORT or neither, got it alone")
    if given:
        return
    if place.starter == "srun":
        address, port = slurm_nodes.meeting_point(environ)
    else:
        address, port = mpi.agree_on_meeting_point(place.rank, place.world_size, place.per_node)
    if place.per_node >= place.world_size:
        address = "127.0.0.1"
    environ["MASTER_ADDR"], environ["MASTER_PORT"] = address, str(port)


def _name_interface(environ: MutableMapping[str, str], local_size: int) -> None:
    """Tell gloo its interface: by itself it takes that of the machine's name, which may be loopback."""
    if "GLOO_SOCKET_IFNAME" in environ or "MASTER_ADDR" not in environ:
        return
    is_alone = local_size >= _number(environ, "WORLD_SIZE", 1)
    address = network.address_towards(environ["MASTER_ADDR"])
    if address is not None and address.startswith("127.") and not is_alone:
        address = network.own_address(environ)
    interface = None if address is None else network.interface_of(address)
    if interface is not None:
        environ["GLOO_SOCKET_IFNAME"] = interface
