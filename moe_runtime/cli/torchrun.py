"""Runs the ranks of this machine under torchrun, and says in one line how that ended.

torchrun is called in this process, not as a program of its own, for three reasons that were found by
trying. Its answer to any failed rank, a mistyped path as much as a crash, is a traceback and exit code
1; called as a function it hands over which rank failed and how. Its answer to Ctrl-C or SIGTERM is a
traceback and exit code 1 too, even when every rank then saved and ended well. And after a signal it
kills ranks that take longer than a fixed time, which a large checkpoint may.

So the signals are handled here. They go to the ranks alone, which agree on a step, save, and exit
0; torchrun then sees a plain success. Ranks sit in sessions of their own, so the terminal's Ctrl-C does
not reach them a second time. A second Ctrl-C sends SIGTERM, further ones SIGKILL. When a rank
dies torchrun sends SIGTERM to the others at once, and SIGKILL after 30 s to those that are deaf to it.

A rank that fails writes `rank{R}.json` with its exit code and message into the folder named by
MOE_RUNTIME_STATUS_DIR and prints nothing, so that one mistake is one line and not one for each rank.
"""

import json
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from moe_runtime.parallel.heartbeat import STATUS_DIR

_CPP_LOG = "TORCH_CPP_LOG_LEVEL"
# Ranks that fail within this time of the first one failed by themselves, not by torchrun's SIGKILL.
_TOGETHER_S = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ESCALATION = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """How the ranks of this machine ended: an exit code, and what the user should read."""

    code: int
    message: str = ""


def run_ranks(torchrun_options: list[str], program: list[str], environment: Mapping[str, str]) -> Outcome:
    """Starts the ranks and waits for their end.

    Args:
        torchrun_options: number of ranks, rendezvous.
        program: what every rank runs: `-m`, a module and its arguments, or a script and its own.
        environment: variables for the ranks; those that are already set win.

    Returns:
        Code 0 if all ranks ended well, after Ctrl-C too; 130 if Ctrl-C came before there was anything
        to save; 2 for a user's mistake; 3 if a rank was lost; 1 for a defect.
    """
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    # The launcher says itself, in one line, what torch's C++ would put into a page; ranks may speak.
    for_ranks, os.environ[_CPP_LOG] = os.environ.get(_CPP_LOG, "ERROR"), "FATAL"
    # Imported here: torch takes seconds, and a wrong config should be told at once.
    from torch.distributed import DistError
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    os.environ[_CPP_LOG] = for_ranks
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="moe_runtime_") as folder:
        os.environ[STATUS_DIR] = folder
        # torchrun makes a folder for logs, used or not, and leaves it; here it goes with the rest.
        options = ["--max-restarts=0", "--signals-to-handle=SIGQUIT", f"--log-dir={folder}/logs"]
        with _signals_to_ranks() as received:
            try:
                torchrun.main([*options, *torchrun_options, *program])
            except ChildFailedError as error:
                failures = first_failures(error.failures)
                return explain_end(failures, read_statuses(Path(folder)), interrupted=bool(received))
            except (DistError, RendezvousError) as error:
                reason = str(error).splitlines()[0][:160]
                text = f"not all machines came ({reason}); check that the others run and reach the master"
                return Outcome(3, text)
    return Outcome(0)


def read_statuses(folder: Path) -> dict[int, dict[str, Any]]:
    """What failed ranks left: `{"code": int, "message": str}` by global rank."""
    return {
        int(file.stem.removeprefix("rank")): json.loads(file.read_text())
        for file in sorted(folder.glob("rank*.json"))
    }


def first_failures(failures: Mapping[int, Any]) -> dict[int, int]:
    """Exit codes of the ranks that failed first, without those that torchrun ended because of them.

    Args:
        failures: torchrun's records by rank; `timestamp` is in whole seconds.
    """
    start = min(failure.timestamp for failure in failures.values())
    early = {rank: f.exitcode for rank, f in failures.items() if f.timestamp - start < _TOGETHER_S}
    return {rank: code for rank, code in early.items() if code != -signal.SIGTERM} or early


def explain_end(
    failures: Mapping[int, int], statuses: Mapping[int, Mapping[str, Any]], interrupted: bool
) -> Outcome:
    """One outcome from many: the cause before its consequences.

    A killed rank comes first, then a defect, then a user's mistake, then a lost peer: the later ones
    may be what other ranks say of one that went for an earlier reason.

    Args:
        failures: exit codes of ranks that failed by themselves, negative for a signal.
        statuses: what ranks wrote before they ended.
        interrupted: the user had asked to stop.
    """
    silent = {rank: code for rank, code in sorted(failures.items()) if rank not in statuses}
    by_code = {
        status["code"]: (rank, status["message"]) for rank, status in sorted(statuses.items(), reverse=True)
    }
    if interrupted and 1 not in by_code:
        return Outcome(130, "stopped before the end of the step; the last checkpoint stands")
    for rank, code in silent.items():
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            how = f"rank {rank} was ended by {signal.Signals(-code).name}{hint}"
            return Outcome(3, f"{how}; train resumes from the last checkpoint by the same command")
    if 1 in by_code:
        rank, message = by_code[1]
        return Outcome(1, f"rank {rank}: {message}")
    for rank, code in silent.items():
        return Outcome(code, f"rank {rank} ended with exit code {code}")
    code = min(by_code)
    return Outcome(code, by_code[code][1])


@contextmanager
def _signals_to_ranks() -> Iterator[list[int]]:
    """While open, signals to this process go to the ranks; gives the list of those that came."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        wanted = _ESCALATION[min(len(received), len(_ESCALATION) - 1)]
        received.append(number)
        if len(received) == 1:
            os.write(sys.stderr.fileno(), b"stopping after this step; once more to stop at once\n")
        for child in psutil.Process().children():
            try:
                child.send_signal(wanted)
            except psutil.NoSuchProcess:
                continue

    before = {number: signal.signal(number, pass_on) for number in _SIGNALS}
    watched, wakes = os.pipe()
    os.set_blocking(wakes, False)
    before_fd = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    threading.Thread(target=_leave_if_alone, args=(watched,), daemon=True).start()
    try:
        yield received
    finally:
        signal.set_wakeup_fd(before_fd)
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_if_alone(watched: int) -> None:
    """End this process when a signal comes while there is no rank yet to pass it on to.

    While it waits for other machines the main thread is inside torch, where no handler of Python's
    runs; the interpreter still writes each signal to this pipe at once.
    """
    while os.read(watched, 1):
        time.sleep(0.5)
        if not psutil.Process().children():
            os.write(sys.stderr.fileno(), b"stopped while waiting for the other machines\n")
            os._exit(130)
