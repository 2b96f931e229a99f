"""A rank that does what its arguments say, to see what the launcher makes of it: `[rank:]deed[@attempt] ...`.

sleep     until a signal; then exit 0, as a rank that saved its checkpoint
kill      itself with SIGKILL after a moment
code=N    leave a status file with the code and exit with it
hang      deaf to all signals but SIGKILL

A deed with an attempt is done in that attempt alone.
"""

import os
import signal
import sys
import time

from moe_runtime.cli.supervise.outcome import leave_status, leave_stopped


def _deed() -> str:
    """The deed of this rank in this attempt, or the one without a rank."""
    rank, attempt = os.environ["RANK"], os.environ["MOE_RUNTIME_ATTEMPT"]
    for argument in sys.argv[1:]:
        deed, at, only = argument.partition("@")
        whose, colon, what = deed.partition(":")
        if (not colon or whose == rank) and (not at or only == attempt):
            return what if colon else deed
    return "fine"


def _stop(*_: object) -> None:
    leave_stopped(int(os.environ["RANK"]))
    sys.exit(0)


def main() -> None:
    """Does the deed."""
    deed = _deed()
    if deed == "sleep":
        signal.signal(signal.SIGTERM, _stop)
        print(f"rank {os.environ['RANK']} ready", flush=True)
        time.sleep(60)
        sys.exit(1)
    if deed == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.write(1, b"ready\n")  # whole, beside the other rank
        time.sleep(60)
    if deed == "kill":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if deed.startswith("code="):
        code = int(deed.removeprefix("code="))
        leave_status(os.environ["RANK"], code, f"message of code {code}")
        sys.exit(code)


if __name__ == "__main__":
    main()
