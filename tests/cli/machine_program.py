"""One launcher of several, whose ranks are `rank_program`s: `RANK PORT LEAST MOST RUN_DIR DEED ...`.

The layout is of `MOST` data-parallel replicas, one on each machine; half of them divide its batch.
"""

import os
import sys
from pathlib import Path

from moe_runtime.cli.supervise.job import Job, Machines
from moe_runtime.cli.supervise.run import run_ranks
from moe_runtime.config.load import load_config


def main() -> int:
    """Runs the ranks of this machine."""
    rank, port, least, most = map(int, sys.argv[1:5])
    overrides = ["layout.pp=1", f"layout.dp={most}", "layout.ep=1", "layout.schedule=auto"]
    batch = [f"batch.global_batch_size={4 * most}", "batch.ramp_start_size=null", "reliability.rejoin_s=10"]
    config = load_config("quickstart", [*overrides, *batch])
    outcome = run_ranks(
        Job(
            ("-m", "tests.cli.rank_program", *sys.argv[6:]),
            ranks=1,
            reliability=config.reliability,
            run_dir=Path(sys.argv[5]),
            timeout_s=60.0,
            machines=Machines(least, most, rank, "127.0.0.1", port, "127.0.0.1"),
            config=config,
        )
    )
    print(outcome.message, file=sys.stderr, flush=True)
    return outcome.code


if __name__ == "__main__":
    os._exit(main())
