"""`python -m moe_runtime.cli.launch [options] COMMAND ...`: as many processes as the command needs.

`train` has several, and `generate --ep N`. A run's config is loaded and its layout checked here, once, before
any process is started, so that a mistake is told in one line and at once. Then `supervise/` starts ranks and
keeps them alive, unless others do: the deepspeed launcher, mpiexec, or a job of Slurm (`launchers/`).
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moe_runtime.cli import generate, network, train
from moe_runtime.cli.launch_options import parse_options
from moe_runtime.cli.launchers.hostfile import deepspeed_command, read_hostfile
from moe_runtime.cli.launchers.mpi import find_mpiexec, mpiexec_command
from moe_runtime.cli.launchers.sbatch import Shape, sbatch_file
from moe_runtime.cli.rank_output import read_ranks
from moe_runtime.cli.supervise.job import Job, Machines
from moe_runtime.cli.supervise.run import run_ranks
from moe_runtime.cli.supervise.shrink import fit_shape
from moe_runtime.cli.usage import run_typer
from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.config.schema import RunConfig
from moe_runtime.errors import ConfigError, MoeRuntimeError
from moe_runtime.metrics.alert_rules import rules_of
from moe_runtime.train.fault import read_faults, split_orders


def main(arguments: list[str] | None = None, program: str = "launch.sh") -> int:
    """Runs a command; returns its exit code (see `run_ranks`).

    Args:
        arguments: options, command and its own; None: those of this process.
        program: what the user typed before them, for messages.
    """
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments, program)
        if options.command[:1] == ["train"]:
            return _launch_train(options, program)
        processes = parse_generate(options.command[1:]) if options.command[:1] == ["generate"] else 1
        if processes == 1:
            return _become(options.command)
        job = Job(_program(options), processes, _environment(processes, "127.0.0.1"))
        return _run(job)
    except MoeRuntimeError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _launch_train(options: argparse.Namespace, program: str) -> int:
    parameters = parse_train(options.command[1:], program)
    config = load_config(parameters["config"], train.with_wandb(parameters["overrides"], parameters["wandb"]))
    rules_of(config)  # refuses alerts on what no record has, before ranks are started
    if options.slurm:
        return _print_batch_file(options, config, parameters["fresh"])
    if options.mpi or options.hostfile is not None:
        return _start_by_others(options, config)
    least, most = options.nnodes or (1, 1)
    per_node = ranks_per_node(config, most, options.nproc)
    read_faults(split_orders(parameters["inject"] or ())[0], per_node * most)
    read_ranks(parameters["log_ranks"], per_node * most)
    fit_shape(config, least * per_node)
    machines = this_machine(options)
    run_dir = Path(config.out_dir) / config.name
    if sys.stderr.isatty():  # in a pipe nobody waits for the first word
        print(f"starting {per_node} processes for {run_dir}", file=sys.stderr, flush=True)
    job = Job(
        _program(options),
        per_node,
        _environment(per_node, machines.address if machines else "127.0.0.1"),
        config.reliability,
        run_dir,
        config.train.peer_timeout_s,
        machines,
        config,
    )
    return _run(job)


def _start_by_others(options: argparse.Namespace, config: RunConfig) -> int:
    """Become mpiexec or the deepspeed launcher."""
    hosts = {} if options.hostfile is None else read_hostfile(options.hostfile)
    size = check_layout(config, sum(hosts.values()) or options.nproc).world_size
    if options.mpi:
        return _become_program(mpiexec_command(find_mpiexec(), size, hosts, options.command))
    if config.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    here = None if options.node_rank is None else (options.node_rank, options.master)
    return _become_program(deepspeed_command(options.hostfile, hosts, options.command, here))


def _print_batch_file(options: argparse.Namespace, config: RunConfig, fresh: bool) -> int:
    """A file for sbatch on standard output; machines of eight GPUs unless the user says otherwise."""
    if fresh:
        raise ConfigError(
            "--slurm: expected no --fresh, for it would begin anew whenever the job is queued again; "
            "remove the run folder instead"
        )
    size, gpus = check_layout(config).world_size, config.device != "cpu"
    per_node = options.nproc or (min(size, _GPUS_OF_A_MACHINE) if gpus else size)
    least, most = options.nnodes or (max(1, size // per_node),) * 2
    shape = Shape(least, most, ranks_per_node(config, most, options.nproc, gpus_here=0), gpus)
    fit_shape(config, least * shape.per_node)
    run_dir = Path(config.out_dir) / config.name
    print(sbatch_file(config.name, run_dir, shape, options.nproc is not None, options.command), end="")
    return 0


_GPUS_OF_A_MACHINE = 8


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


def parse_train(arguments: list[str], program: str = "launch.sh") -> dict[str, Any]:
    """The parameters of `train`, read by the command itself; --help ends here.

    Raises:
        UsageMistake: a wrong option, or no config.
    """
    return _parse(train.train, f"{program} train", arguments)


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


def ranks_per_node(config: RunConfig, nnodes: int, nproc: int | None, gpus_here: int | None = None) -> int:
    """Processes on each machine.

    Args:
        config: the run; its layout says how many processes there are in all.
        nnodes: machines.
        nproc: the user's own choice.
        gpus_here: GPUs of this machine; None: those that torch finds; 0: it does not matter.

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
    gpus = 0 if config.device == "cpu" else count_gpus() if gpus_here is None else gpus_here
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
    (least, most), node_rank = options.nnodes or (1, 1), options.node_rank or 0
    if not 0 <= node_rank < most:
        raise ConfigError(f"--node-rank: expected 0 to {most - 1}, got {node_rank}")
    if options.master is None:
        if most > 1:
            raise ConfigError(
                "--master: expected HOST:PORT of machine 0, for there is more than one; got none"
            )
        return None
    host, port = network.split_address(options.master)
    if most == 1:
        return None
    address = network.address_towards(host)
    if address is None:
        raise ConfigError(f"--master: {host} has no address, or there is no route to it; give another name")
    if network.is_public(host):
        text = f"warning: --master {host} is a public address; whoever reaches it can disturb the run"
        print(f"{text}: use a network of your own", file=sys.stderr)
    return Machines(least, most, node_rank, host, port, address)


def _become(command: list[str]) -> int:
    return _become_program([sys.executable, "-m", "moe_runtime", *command])


def _become_program(arguments: list[str]) -> int:
    sys.stdout.flush()
    os.execv(arguments[0], arguments)


def as_command(
    arguments: Annotated[list[str] | None, typer.Argument(help="[OPTIONS] train CONFIG [a.b=c ...]")] = None,
) -> None:
    """Train with several machines, mpiexec, the deepspeed launcher or Slurm; --help lists the options."""
    leave(main(arguments or [], "moe-runtime launch"))


def leave(code: int) -> NoReturn:
    """End this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread that waits on a link that was cut would hold up, or abort, a plain exit


if __name__ == "__main__":
    leave(main())
