"""A Slurm of one machine: `srun` and `scontrol` that really start tasks, with the variables of the real ones.

Nodes are what STAND_IN_NODES lists: a JSON object of name -> the words to put before a command so that it
runs there. `srun` starts the tasks of each node, passes SIGTERM on to them, and ends with the largest of
their exit codes; `scontrol requeue` takes a note in STAND_IN_NOTES.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path, nodes: dict[str, list[str]]) -> dict[str, str]:
    """Put the programs into a folder; gives the variables of a job of these nodes."""
    folder.mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (folder / name).write_text(
            f'#!/bin/sh\nPYTHONPATH={_ROOT} exec {sys.executable} -m tests.cli.stand_in_slurm {name} "$@"\n'
        )
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "STAND_IN_NODES": json.dumps(nodes),
        "STAND_IN_NOTES": str(folder / "notes"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": ",".join(nodes),
        # What every shell of a job has, and what makes no rank of it.
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": str(len(nodes)),
    }


def notes(folder: Path) -> list[str]:
    """What was asked of `scontrol`."""
    path = folder / "notes"
    return path.read_text().splitlines() if path.exists() else []


def _srun(words: list[str]) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ntasks-per-node", type=int, default=1)
    for option in ("--cpu-bind", "--kill-on-bad-exit", "--distribution", "--gpus-per-task"):
        parser.add_argument(option)
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args(words)
    nodes = json.loads(os.environ["STAND_IN_NODES"])
    per_node, size = options.ntasks_per_node, options.ntasks_per_node * len(nodes)
    step = {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(size),
        "SLURM_STEP_NODELIST": ",".join(nodes),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{len(nodes)})" if len(nodes) > 1 else str(per_node),
    }
    tasks = []
    for node, inside in enumerate(nodes.values()):
        for local in range(per_node):
            own = {"SLURM_PROCID": node * per_node + local, "SLURM_LOCALID": local, "SLURM_NODEID": node}
            environment = {**os.environ, **step, **{name: str(number) for name, number in own.items()}}
            tasks.append(subprocess.Popen([*inside, *options.command], env=environment))
    signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
    return max(task.wait() for task in tasks)


def _scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        print("\n".join(words[2].split(",")))
    else:
        with open(os.environ["STAND_IN_NOTES"], "a") as file:
            file.write(" ".join(words) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit({"srun": _srun, "scontrol": _scontrol}[sys.argv[1]](sys.argv[2:]))
