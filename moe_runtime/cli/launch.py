"""`python -m moe_runtime.cli.launch [options] COMMAND ...`: as many processes as the command needs.

`train` has several, and `generate --ep N`. A run's config is loaded and its layout checked here, once, before
any process is started, so that a mistake is told in one line and at once. Then `supervise/` starts ranks and
keeps them alive; with a hostfile the `deepspeed` launcher starts them.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from moe_runtime.cli import generate, network, train
from moe_runtime.cli.hostfile import deepspeed_command, read_hostfile
from moe_runtime.cli.supervise.job import Job, Machines
from moe_runtime.cli.supervise.run import run_ranks
from moe_runtime.cli.supervise.shrink import fit_shape
from moe_runtime.cli.usage import OneLineParser, run_typer
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.train.fault import read_faults, split_orders


def parse_options(arguments: list[str]) -> argparse.Namespace:
    """The options before the command, and the command with its own.

    Raises:
        UsageMistake: an option is unknown, wrong, or does not go with the others or the command.
    """
    parser = OneLineParser(prog="launch.sh", allow_abbrev=False, description="Runs moe-runtime commands.")
    parser.add_argument(
        "--nnodes",
        type=_counts,
        default=(1, 1),
        metavar="N|MIN:MAX",
        help="machines; the same command on each",
    )
    parser.add_argument("--node-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--master", metavar="HOST:PORT", help="machine 0, and a free port on it")
    parser.add_argument("--hostfile", type=Path, help="lines `host slots=N`; starts all through deepspeed")
    parser.add_argument("--nproc", type=_count, help="processes on each machine, if not what the layout says")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train CONFIG a.b=c ..., or any other")
    options = parser.parse_args(arguments)
    given = [name for name in _FOR_TRAIN if getattr(options, name) != parser.get_default(name)]
    shown = [f"--{name.replace('_', '-')}" for name in given]
    if given and options.command[:1] != ["train"]:
        got = " ".join(options.command[:1]) or "no command"
        parser.error(f"{shown[0]} is for train, the only command of several processes, got {got}")
    if options.hostfile is not None and len(given) > 1:
        other = next(name for name in shown if name != "--hostfile")
        parser.error(f"{other} does not go with --hostfile, which says the machines and their processes")
    return options


_FOR_TRAIN = ("nnodes", "node_rank", "master", "hostfile", "nproc")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _counts(text: str) -> tuple[int, int]:
    """`4` or `2:4`: the fewest machines that will do, and all of them."""
    least, colon, most = text.partition(":")
    pair = _count(least), _count(most if colon else least)
    if pair[0] > pair[1]:
        raise argparse.ArgumentTypeError(f"expected MIN:MAX with MIN not above MAX, got {text!r}")
    return pair


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (see `run_ranks`)."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        if options.command[:1] == ["train"]:
            return _launch_train(options)
        processes = parse_generate(options.command[1:]) if options.command[:1] == ["generate"] else 1
        if processes == 1:
            return _become(options.command)
        job = Job(_program(options), processes, _environment(processes, "127.0.0.1"))
        return _run(job)
    except MoeRuntimeError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _launch_train(options: argparse.Namespace) -> int:
    parameters = parse_train(options.command[1:])
    config = load_config(parameters["config"], parameters["overrides"] or ())
    if options.hostfile is not None:
        hosts = read_hostfile(options.hostfile)
        check_layout(config, sum(hosts.values()))
        if config.device == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        return _become_program(deepspeed_command(options.hostfile, hosts, options.command))
    least, most = options.nnodes
    per_node = ranks_per_node(config, most, options.nproc)
    read_faults(split_orders(parameters["inject"] or ())[0], per_node * most)
    fit_shape(config, least * per_node)
    machines = this_machine(options)
    job = Job(
        _program(options),
        per_node,
        _environment(per_node, machines.address if machines else "127.0.0.1"),
        config.reliability,
        Path(config.out_dir) / config.name,
        config.train.peer_timeout_s,
        machines,
        config,
    )
    return _run(job)


def _program(options: argparse.Namespace) -> tuple[str, ...]:
    return ("-m", "moe_runtime", *options.command)


def _environment(per_node: int, address: str) -> dict[str, str]:
    """What ranks find in their environment, unless the user has set it otherwise."""
    interface = network.interface_of(address)
    return {
        # Else every rank would take all cores and they would slow each other down.
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // per_node)),
        # Else the store warns, for every connection, that the address has no name.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **({} if interface is None else {"GLOO_SOCKET_IFNAME": interface}),
    }


def _run(job: Job) -> int:
    """The exit code of a job; what the user should read is printed."""
    outcome = run_ranks(job)
    if outcome.message:
        print(outcome.message, file=sys.stderr)
    return outcome.code


def parse_train(arguments: list[str]) -> dict[str, Any]:
    """The parameters of `train`, read by the command itself; --help ends here.

    Raises:
        UsageMistake: a wrong option, or no config.
    """
    return _parse(train.train, "launch.sh train", arguments)


def parse_generate(arguments: list[str]) -> int:
    """How many processes a `generate` wants.

    Raises:
        UsageMistake: a wrong option, or no checkpoint.
    """
    processes: int = _parse(generate.generate, "moe-runtime generate", arguments)["ep"]
    return processes


def _parse(command: Callable[..., None], program: str, arguments: list[str]) -> dict[str, Any]:
    parameters: dict[str, Any] = {}

    @functools.wraps(command)
    def record(**values: Any) -> None:
        parameters.update(values)

    reader = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    reader.command()(record)
    code = run_typer(reader, program, arguments)
    if not parameters:
        raise SystemExit(code)
    return parameters


def ranks_per_node(config: RunConfig, nnodes: int, nproc: int | None) -> int:
    """Processes on each machine.

    Args:
        config: the run; its layout says how many processes there are in all.
        nnodes: machines.
        nproc: the user's own choice.

    Raises:
        ConfigError: they do not spread evenly, do not match the layout, or outnumber the GPUs.
    """
    if nproc is not None:
        check_layout(config, nproc * nnodes)
        return nproc
    world_size = check_layout(config).world_size
    if world_size % nnodes:
        wanted = f"a divisor of the {world_size} processes of pp {config.layout.pp} x dp {config.layout.dp}"
        raise ConfigError(f"--nnodes: expected {wanted}, got {nnodes}")
    per_node = world_size // nnodes
    gpus = 0 if config.device == "cpu" else count_gpus()
    if gpus and per_node > gpus:
        raise ConfigError(
            f"layout: pp {config.layout.pp} x dp {config.layout.dp} needs {per_node} processes on each of "
            f"{nnodes} machines, got {gpus} GPUs and runs one process on each; use more machines, a "
            f"smaller layout, or device=cpu"
        )
    return per_node


def count_gpus() -> int:
    """GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def this_machine(options: argparse.Namespace) -> Machines | None:
    """This machine among the others; None if there are none.

    Raises:
        ConfigError: the machines could not find each other.
    """
    least, most = options.nnodes
    if not 0 <= options.node_rank < most:
        raise ConfigError(f"--node-rank: expected 0 to {most - 1}, got {options.node_rank}")
    if options.master is None:
        if most > 1:
            raise ConfigError(
                "--master: expected HOST:PORT of machine 0, for there is more than one; got none"
            )
        return None
    host, colon, port = options.master.rpartition(":")
    if not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--master: expected HOST:PORT, such as 10.0.0.1:29500, got {options.master}")
    if most == 1:
        return None
    address = network.address_towards(host)
    if address is None:
        raise ConfigError(f"--master: {host} has no address, or there is no route to it; give another name")
    if network.is_public(host):
        text = f"warning: --master {host} is a public address; whoever reaches it can disturb the run"
        print(f"{text}: use a network of your own", file=sys.stderr)
    return Machines(least, most, options.node_rank, host, int(port), address)


def _become(command: list[str]) -> int:
    return _become_program([sys.executable, "-m", "moe_runtime", *command])


def _become_program(arguments: list[str]) -> int:
    sys.stdout.flush()
    os.execv(arguments[0], arguments)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that waits on a link that was cut would hold up, or abort, a plain exit
