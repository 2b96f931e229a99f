"""A rank that does what its arguments say, to see what the launcher makes of it: `[rank:]deed ...`.

sleep     until a signal; then exit 0, as a rank that saved its checkpoint
kill      itself with SIGKILL after a moment
code=N    leave a status file with the code and exit with it
hang      deaf to all signals but SIGKILL
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def _leave(code: int) -> None:
    message = {"code": code, "message": f"message of code {code}"}
    Path(os.environ["MOE_RUNTIME_STATUS_DIR"], f"rank{os.environ['RANK']}.json").write_text(
        json.dumps(message)
    )
    sys.exit(code)


def main() -> None:
    """Does the deed of this rank, or the one without a rank."""
    deeds = dict(argument.split(":") for argument in sys.argv[1:] if ":" in argument)
    deed = deeds.get(os.environ["RANK"], next((a for a in sys.argv[1:] if ":" not in a), "fine"))
    if deed == "sleep":
        signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
        print(f"rank {os.environ['RANK']} ready", flush=True)
        time.sleep(60)
        sys.exit(1)
    if deed == "hang":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    if deed == "kill":
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if deed.startswith("code="):
        _leave(int(deed.removeprefix("code=")))


if __name__ == "__main__":
    main()
