"""A batch file for Slurm: one of our launchers on each machine of the job.

srun starts launchers and not ranks, because a launcher watches its ranks, names one that hangs, and begins
again from the newest checkpoint within the same job. (srun can start the ranks itself, see `environment`;
then a lost rank ends the job.) The lines below are what a job on a cluster needs and people find out late:

- a task is bound to one core unless told otherwise, and all ranks of the machine would share it;
- before the time limit, and before a preemption, every launcher gets SIGTERM: the run saves, leaves
  preempted.json, and the job is queued again;
- the port is the job's own, below those that Linux gives out by itself.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.cli.launchers.slurm_nodes import FIRST_PORT, NUM_PORTS
from moe_runtime.train.preempted import MARKER

_SAVE_S = 300
_FILE = """\
#!/bin/bash
# Trains {name}: {machines} of {per_node} processes. Options of sbatch on its command line win over these:
#   sbatch --partition=NAME --account=NAME --time=24:00:00 THIS_FILE
# All machines must see this folder, the Python below and the run folder.
#SBATCH --job-name={job}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{gpus}\
#SBATCH --exclusive
#SBATCH --chdir={folder}
#SBATCH --output=slurm-%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@{save_s}
{keep}\
set -euo pipefail

# Rank 0 lives on the first machine; the port is this job's own.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r master <<<"$hosts"
port=$(({first_port} + SLURM_JOB_ID % {num_ports}))

# One launcher on each machine starts, watches and restarts the ranks there. --cpu-bind=none: they share all
# cores of the machine, not the one that Slurm would bind the launcher to.
code=0
# shellcheck disable=SC2016 # each task reads its own number
srun --ntasks-per-node=1 --cpu-bind=none {tasks} \\
  bash -c 'exec "$0" -m moe_runtime.cli.launch --node-rank "$SLURM_NODEID" "$@"' \\
  {python} \\
  --nnodes {nnodes} --master "$master:$port" {nproc}\\
  {command} || code=$?

# {save_s} s before the time limit, or when preempted, the run has saved and left this word: go on later.
if [[ $code == 0 && -e {marker} ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


@dataclass(frozen=True)
class Shape:
    """What a job takes.

    Args:
        least, most: machines.
        per_node: processes on each.
        gpus: one GPU for each process.
    """

    least: int
    most: int
    per_node: int
    gpus: bool


def sbatch_file(name: str, run_dir: Path, shape: Shape, own_nproc: bool, command: list[str]) -> str:
    """The text of the file.

    Args:
        name: of the run.
        run_dir: its folder, as the ranks name it.
        shape: machines and processes.
        own_nproc: the user has chosen `per_node`, so the launchers must be told.
        command: `train CONFIG ...`.
    """
    is_elastic = shape.least < shape.most
    return _FILE.format(
        name=name,
        job=shlex.quote(name),
        machines=f"{shape.most} machine{'s' if shape.most > 1 else ''}",
        per_node=shape.per_node,
        nodes=f"{shape.least}-{shape.most}" if is_elastic else shape.most,
        gpus=f"#SBATCH --gpus-per-node={shape.per_node}\n" if shape.gpus else "",
        folder=shlex.quote(str(Path.cwd())),
        save_s=_SAVE_S,
        keep="#SBATCH --no-kill\n" if is_elastic else "",
        first_port=FIRST_PORT,
        num_ports=NUM_PORTS,
        # A run that may shrink goes on without a machine; any other cannot, and should end at once.
        tasks="--no-kill --kill-on-bad-exit=0" if is_elastic else "--kill-on-bad-exit=1",
        python=shlex.quote(sys.executable),
        nnodes=f"{shape.least}:{shape.most}" if is_elastic else shape.most,
        nproc=f"--nproc {shape.per_node} " if own_nproc else "",
        command=shlex.join(command),
        marker=shlex.quote(str(run_dir / MARKER)),
    )
