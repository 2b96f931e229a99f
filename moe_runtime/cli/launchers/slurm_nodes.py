"""What Slurm says of a step: its machines, their tasks, their limits."""

import re
from collections.abc import Mapping, MutableMapping

from moe_runtime.errors import ConfigError

# Below the ports that Linux gives out by itself, from 32,768.
FIRST_PORT, NUM_PORTS = 20_000, 12_000
_COUNT = re.compile(r"(\d+)(?:\(x(\d+)\))?")
_NAME = re.compile(r"(?:[^,\[\]]|\[[^\]]*\])+")  # commas separate names, but not within brackets
_RANGE = re.compile(r"\[([^\]]*)\]")


def tasks_per_node(text: str) -> list[int]:
    """Tasks of each machine from `4(x2),3`.

    Raises:
        ConfigError: not in that form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = _COUNT.fullmatch(part)
        if match is None:
            raise ConfigError(f"srun: expected tasks of machines such as 4(x2),3, got {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def node_names(text: str) -> list[str]:
    """Machines from `gpu[01-03,7],login`, in Slurm's order."""
    return [name for part in _NAME.findall(text) for name in _unfold(part)]


def _unfold(name: str) -> list[str]:
    """One name with ranges in brackets, the last of which counts fastest."""
    match = _RANGE.search(name)
    if match is None:
        return [name]
    rest = _unfold(name[match.end() :])
    heads: list[str] = []
    for part in match[1].split(","):
        first, dash, last = part.partition("-")
        numbers = range(int(first), int(last if dash else first) + 1)
        heads += [f"{name[: match.start()]}{number:0{len(first)}d}" for number in numbers]
    return [head + tail for head in heads for tail in rest]


def meeting_point(environ: Mapping[str, str]) -> tuple[str, int]:
    """Host and port on which all ranks of a step can agree without a word: rank 0 is on the first host.

    Raises:
        ConfigError: Slurm does not say the machines.
    """
    names = node_names(environ.get("SLURM_STEP_NODELIST", ""))
    if not names:
        raise ConfigError("SLURM_STEP_NODELIST: expected the machines of this step from srun, got nothing")
    number = int(environ.get("SLURM_JOB_ID", "0")) + int(environ.get("SLURM_STEP_ID", "0"))
    return names[0], FIRST_PORT + number % NUM_PORTS


def adopt_limits(environ: MutableMapping[str, str]) -> None:
    """Threads and GPU of a task that Slurm has given its own."""
    if environ.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        environ.setdefault("OMP_NUM_THREADS", environ["SLURM_CPUS_PER_TASK"])
    if environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1":
        environ["LOCAL_RANK"] = "0"  # it sees one GPU, whatever its place on the machine
