"""Runs jobs of `rank_program` under the launcher's agent, one after the other: `CASES FOLDER`.

A program of its own because the launcher changes its process: signal handlers and environment. Prints a JSON
list with exit code, message, seconds, processes and open files that were left, for each case.
"""

import json
import os
import sys
import time
from pathlib import Path

import psutil

from moe_runtime.cli.supervise.job import Job
from moe_runtime.cli.supervise.run import run_ranks
from moe_runtime.config.reliability import ReliabilityConfig


def _run(case: dict, run_dir: Path) -> dict:
    run_dir.mkdir()
    program = ("-m", "tests.cli.rank_program", *case["deeds"])
    reliability = ReliabilityConfig(restarts=case["restarts"], back_off_s=0.2)
    begin = time.monotonic()
    outcome = run_ranks(Job(program, 2, reliability=reliability, run_dir=run_dir))
    seconds = time.monotonic() - begin
    left = [child.pid for child in psutil.Process().children(recursive=True)]
    files = psutil.Process().num_fds()
    return {
        "code": outcome.code,
        "message": outcome.message,
        "seconds": seconds,
        "left": left,
        "files": files,
    }


def main() -> None:
    """Runs all cases."""
    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    results = [_run(case, folder / str(number)) for number, case in enumerate(cases)]
    print(json.dumps(results))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
