"""Joins this process to the run: device, back end, process group.

NCCL with one process per GPU where GPUs are, gloo otherwise. A run of one process gets a group of its
own over an in-memory store, so that nothing above has to ask whether there is one.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from moe_runtime.errors import ConfigError, PeerLost
from moe_runtime.parallel.heartbeat import ATTEMPT
from moe_runtime.parallel.meeting import TOKEN, check_token, host_store, join_store

# Of a full machine: the last one of a shrunk run may have fewer.
RANKS_PER_NODE = "MOE_RUNTIME_RANKS_PER_NODE"


@dataclass(frozen=True)
class World:
    """Where this process stands.

    Args:
        rank: global rank.
        world_size: processes of the run.
        local_rank: rank on this machine; picks the GPU.
        ranks_per_node: processes on each machine.
        device: where the model lives.
        attempt: which start of the run's processes by one launcher this is, from 1.
    """

    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int
    device: torch.device
    attempt: int = 1


def read_world(wanted_device: str) -> World:
    """Read rank and size from the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK).

    Args:
        wanted_device: auto, cpu or cuda.

    Raises:
        ConfigError: cuda is wanted and there is none, there are fewer GPUs than local ranks, or a variable
            is no number.
    """
    world_size, local_rank = _number("WORLD_SIZE", 1), _number("LOCAL_RANK", 0)
    per_node = _number(RANKS_PER_NODE, _number("LOCAL_WORLD_SIZE", world_size))
    has_gpu = torch.cuda.is_available()
    if wanted_device == "cuda" and not has_gpu:
        raise ConfigError("device: expected a GPU, got none that torch can use; set device=cpu")
    use_gpu = has_gpu and wanted_device != "cpu"
    if use_gpu and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"device: expected one GPU per process, got {torch.cuda.device_count()} GPUs "
            f"for {per_node} processes on this machine; use more machines or set device=cpu"
        )
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    rank, attempt = _number("RANK", 0), _number(ATTEMPT, 1)
    if rank >= world_size:
        raise ConfigError(f"RANK: expected less than WORLD_SIZE {world_size}, got {rank}; unset both")
    return World(rank, world_size, local_rank, per_node, device, attempt)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{variable}: expected the whole number of a launcher, got {text!r}; unset it")
    return int(text)


@contextmanager
def join_world(world: World, timeout_s: float) -> Iterator[None]:
    """Open the default process group for the time of the context.

    Args:
        world: from `read_world`.
        timeout_s: a collective that takes longer raises.

    Raises:
        PeerLost: not all ranks came.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    try:
        store = _open_store(world, timeout_s)
        dist.init_process_group(
            backend, store=store, rank=world.rank, world_size=world.world_size, timeout=timeout
        )
    except (dist.DistError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise PeerLost(
            f"rank {world.rank}: not all of {world.world_size} ranks came within {timeout_s:.0f} s "
            f"({first_line}); check that the others run and reach the master"
        ) from error
    yield
    # Not in a `finally`: after a failure the peers may be gone, and destroying would wait for them.
    dist.destroy_process_group()


def _open_store(world: World, timeout_s: float) -> dist.Store:
    """Where the ranks meet: at their launcher's store, or under another launcher at rank 0's."""
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()
    address, port = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 29500)
    if TOKEN in os.environ:
        store = join_store(address, port, timeout_s)
        check_token(store, os.environ[TOKEN], f"{address}:{port}")
        return store
    if (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    ):  # torchrun itself hosts it, over all attempts
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"attempt{attempt}", join_store(address, port, timeout_s))
    if world.rank == 0:
        # A machine may know its own name as loopback, where no other machine reaches it.
        is_alone = world.ranks_per_node == world.world_size
        is_hidden = not is_alone and socket.gethostbyname(address).startswith("127.")
        return host_store("0.0.0.0" if is_hidden else address, port, timeout_s)
    return join_store(address, port, timeout_s)


def shared_store() -> dist.Store:
    """The store over which the ranks of the default process group met."""
    return dist.distributed_c10d._get_default_store()
