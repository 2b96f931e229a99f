"""The way to many machines through the `deepspeed` launcher: a hostfile, ssh and pdsh.

It passes `--local_rank=N` to every rank, before the command; `moe_runtime.__main__` takes that out. Where
machines cannot be reached by ssh, the launcher is started on each of them, as `--no_ssh --node_rank R`.
"""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

from moe_runtime.cli.network import address_towards, interface_of, loopback_name, split_address
from moe_runtime.errors import ConfigError

_LINE = re.compile(r"^(?P<host>\S+)\s+slots\s*=\s*(?P<slots>[1-9]\d*)\s*(#.*)?$")
_HERE = ("localhost", "127.0.0.1")
_PORT = 29500  # deepspeed's own choice
# What ranks on other machines get from this one, beside what deepspeed passes on by itself.
_PASSED_ON = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "DS_ACCELERATOR", "WANDB_MODE")


def read_hostfile(path: Path) -> dict[str, int]:
    """Processes on each host.

    Raises:
        ConfigError: the file is missing, empty, or a line is not `host slots=N`.
    """
    if not path.is_file():
        raise ConfigError(f"--hostfile: no such file {path}; expected lines like `node0 slots=8`")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.split("#")[0].strip():
            continue
        match = _LINE.match(line.strip())
        if match is None or match["host"] in hosts:
            raise ConfigError(f"{path}:{number}: expected a new host as `host slots=N`, got {line.strip()!r}")
        hosts[match["host"]] = int(match["slots"])
    if not hosts:
        raise ConfigError(f"{path}: expected lines like `node0 slots=8`, got none")
    return hosts


def deepspeed_command(
    hostfile: Path, hosts: dict[str, int], command: list[str], here: tuple[int, str | None] | None = None
) -> list[str]:
    """The program line of the deepspeed launcher.

    Args:
        hostfile: the file itself.
        hosts: what stands in it.
        command: arguments of `python -m moe_runtime`.
        here: number of this machine, and HOST:PORT of machine 0 if that is not the file's first host: only
            the ranks of this machine are started, without ssh. None: all, from here.

    Raises:
        ConfigError: several hosts, and pdsh or ssh is not installed here; a wrong number or address.
    """
    is_local = len(hosts) == 1 and next(iter(hosts)) in _HERE
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // max(hosts.values()))))
    options = [f"--hostfile={hostfile}"]
    if is_local:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback_name() or "lo")
        options += ["--no_ssh_check", "--master_addr=127.0.0.1"]
    elif here is not None:
        options += _this_machine_alone(hosts, *here)
    else:
        _require_ssh()
        os.environ["DS_ENV_FILE"] = _environment_file()
        # A shell on each machine reads the command; deepspeed quotes only what has a space in it.
        command = [word if " " in word else shlex.quote(word) for word in command]
    module = ["--log_level=error", "--module", "moe_runtime"]
    return [sys.executable, "-m", "deepspeed.launcher.runner", *options, *module, *command]


def _this_machine_alone(hosts: dict[str, int], node_rank: int, master: str | None) -> list[str]:
    if not 0 <= node_rank < len(hosts):
        raise ConfigError(f"--node-rank: expected 0 to {len(hosts) - 1}, a host of the file, got {node_rank}")
    first = next(iter(hosts))
    host, port = split_address(master or f"{first}:{_PORT}")
    address = address_towards(host)
    if address is None:
        remedy = "name machine 0 with --master HOST:PORT"
        raise ConfigError(f"--hostfile: {host} has no address, or there is no route to it; {remedy}")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface_of(address) or "lo")
    return ["--no_ssh", f"--node_rank={node_rank}", f"--master_addr={host}", f"--master_port={port}"]


def _require_ssh() -> None:
    for program in ("ssh", "pdsh"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"--hostfile: deepspeed starts other machines with {program}; please install it, or start "
                "this command on each machine with --node-rank R"
            )


def _environment_file() -> str:
    """What deepspeed reads variables for the remote ranks from.

    It lies in memory and goes with the deepspeed launcher, which this process becomes: nothing has
    to be removed after it.
    """
    descriptor = os.memfd_create("moe_runtime_env", 0)
    lines = [f"{name}={os.environ[name]}\n" for name in _PASSED_ON if name in os.environ]
    os.write(descriptor, "".join(lines).encode())
    return f"/proc/self/fd/{descriptor}"
