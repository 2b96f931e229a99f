"""`python -m moe_runtime.cli.rank_tee RANK`: copies its input to its output, and named to standard error."""

import os
import signal
import sys


def main(rank: str) -> None:
    """Copy line by line until the last writer is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for line in sys.stdin.buffer:
        os.write(1, line)
        os.write(2, f"[rank {rank}] ".encode() + line)


if __name__ == "__main__":
    main(sys.argv[1])
