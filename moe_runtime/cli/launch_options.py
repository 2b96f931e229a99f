"""The options before the command: how many processes, on which machines, started by what."""

import argparse
from pathlib import Path

from moe_runtime.cli.usage import OneLineParser

# What goes with each way to start ranks; our own launchers take the rest.
_GOES_WITH = {
    "hostfile": ("hostfile", "mpi", "node_rank", "master"),
    "mpi": ("mpi", "hostfile", "nproc"),
    "slurm": ("slurm", "nnodes", "nproc"),
}
_WHY = {
    "hostfile": "--hostfile, which says the machines and their processes",
    "mpi": "--mpi; mpiexec takes machines from --hostfile",
    "slurm": "--slurm, whose file says it when the job runs",
}


def parse_options(arguments: list[str], program: str = "launch.sh") -> argparse.Namespace:
    """The options before the command, and the command with its own.

    Raises:
        UsageMistake: an option is unknown, wrong, or does not go with the others or the command.
    """
    parser = launch_parser(program)
    options = parser.parse_args(arguments)
    _refuse_mixtures(parser, options)
    if not options.command:
        parser.error("expected a command, such as train CONFIG, got none")
    return options


def launch_parser(program: str = "launch.sh") -> argparse.ArgumentParser:
    """Reads the options and leaves the command as it is."""
    parser = OneLineParser(prog=program, allow_abbrev=False, description="Runs moe-runtime commands.")
    parser.add_argument(
        "--nnodes", type=_counts, metavar="N|MIN:MAX", help="machines; the same command on each"
    )
    parser.add_argument("--node-rank", type=int, help="number of this machine, from 0")
    parser.add_argument("--master", metavar="HOST:PORT", help="machine 0, and a free port on it")
    parser.add_argument(
        "--hostfile",
        type=Path,
        help="lines `host slots=N`; starts all through deepspeed, with --node-rank this machine alone",
    )
    parser.add_argument("--mpi", action="store_true", help="start the ranks with mpiexec")
    parser.add_argument("--slurm", action="store_true", help="print a batch file for Slurm; starts nothing")
    parser.add_argument("--nproc", type=_count, help="processes on each machine, if not what the layout says")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="train CONFIG a.b=c ..., or any other")
    return parser


def _refuse_mixtures(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    given = [
        name for name, value in vars(options).items() if name != "command" and value not in (None, False)
    ]
    if given and options.command[:1] != ["train"]:
        got = " ".join(options.command[:1]) or "no command"
        parser.error(f"{_flag(given[0])} is for train, the only command of several processes, got {got}")
    for way in ("slurm", "mpi", "hostfile"):
        others = [name for name in given if way in given and name not in _GOES_WITH[way]]
        if others:
            parser.error(f"{_flag(others[0])} does not go with {_WHY[way]}")
    if {"hostfile", "master"} <= set(given) and "node_rank" not in given:
        parser.error("--master with --hostfile is for one machine of it, expected --node-rank too, got none")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


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
