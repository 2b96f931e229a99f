"""The `moe-runtime` command: registers the sub-commands, and turns errors into one line and a code."""

import errno
import os
import sys
import time
import traceback
from contextlib import suppress
from typing import Annotated, NoReturn

import typer

from moe_runtime.cli.launchers.environment import rank_here
from moe_runtime.cli.lazy import lazy_app
from moe_runtime.cli.rank_output import leave_no_trace, note, tell_user
from moe_runtime.cli.supervise.outcome import leave_status
from moe_runtime.cli.usage import UsageMistake, run_typer
from moe_runtime.cli.version import show_version
from moe_runtime.config.secrets import redact
from moe_runtime.errors import AlertStop, MoeRuntimeError

COMMANDS = {
    "train": "moe_runtime.cli.train:train",
    "prepare": "moe_runtime.cli.prepare:prepare",
    "generate": "moe_runtime.cli.generate:generate",
    "eval": "moe_runtime.cli.evaluate:evaluate",
    "launch": "moe_runtime.cli.launch:as_command",
    "ablate": "moe_runtime.cli.ablate.command:ablate",
    "plan": "moe_runtime.cli.plan.command:plan",
    "chaos": "moe_runtime.cli.chaos.command:chaos",
    "schedule": "moe_runtime.cli.schedule:schedule",
    "compare": "moe_runtime.cli.compare:compare",
    "checkpoint": "moe_runtime.cli.checkpoint:app",
    "cache": "moe_runtime.cli.cache:app",
    "doctor": "moe_runtime.cli.doctor.command:doctor",
    "config": "moe_runtime.cli.config:app",
    "completion": "moe_runtime.cli.completion.command:completion",
    "context": "moe_runtime.cli.context:app",
    "convert": "moe_runtime.cli.convert:app",
    "bench": "moe_runtime.cli.bench:app",
    "metrics": "moe_runtime.cli.metrics:app",
    "report": "moe_runtime.cli.report:report",
    "dashboard": "moe_runtime.cli.dashboard:dashboard",
}
# What the scripts of shells call.
_UNLISTED = {"complete": "moe_runtime.cli.completion.command:complete"}


def moe_runtime(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Train Mixture-of-Experts language models of the DeepSeek-V3 kind."""


app = lazy_app(moe_runtime, COMMANDS, _UNLISTED)


def main() -> None:
    """Run one command; a user's mistake ends with its message alone and exit code 2."""
    try:
        _require_folder()
        code = _launched() if _is_to_launch(sys.argv[1:]) else run_typer(app, "moe-runtime")
    except KeyboardInterrupt:
        _leave(130, "interrupted before there was anything to save")
    except MoeRuntimeError as error:
        _leave(error.exit_code, str(error))
    except BrokenPipeError:
        _leave(0, "")  # whoever reads our output, such as `head`, has had enough
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            _leave(1, traceback.format_exc())
        place = error.filename or "standard output"
        _leave(MoeRuntimeError.exit_code, f"{place}: expected room to write, got none; free some space")
    except Exception:
        _leave(1, traceback.format_exc())
    else:
        if "RANK" not in os.environ:
            sys.exit(code)
        # A rank leaves at once: gloo groups that outlive the interpreter abort a good run now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _require_folder() -> None:
    """Every relative path means a file of the current folder."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UsageMistake("the current folder was removed; cd to one that is there") from None


def _is_to_speak(rank: int, code: int) -> bool:
    """Whether this rank tells what ended it, where no launcher of ours does.

    A mistake is mostly that of all ranks, and rank 0 tells it. The others give it time, for mpiexec and
    torchrun end all after the first; a mistake of one machine is then told by the first rank there.
    """
    if rank == 0 or code not in (MoeRuntimeError.exit_code, AlertStop.exit_code):
        return True
    time.sleep(_RANK_0_SPEAKS_S)
    return os.environ.get("LOCAL_RANK", "0") == "0"


_RANK_0_SPEAKS_S = 3.0


def _is_to_launch(arguments: list[str]) -> bool:
    """Whether this process is to start the ranks of a command, not to be one."""
    if arguments[:1] == ["launch"]:
        return True
    if rank_here(os.environ) is not None:
        return False
    wants_several = any(word.partition("=")[0] == "--ep" for word in arguments)
    return arguments[:1] == ["train"] or (arguments[:1] == ["generate"] and wants_several)


def _launched() -> NoReturn:
    from moe_runtime.cli import launch

    is_named = sys.argv[1:2] == ["launch"]
    program = "moe-runtime launch" if is_named else "moe-runtime"
    launch.leave(launch.main(sys.argv[2:] if is_named else sys.argv[1:], program))


def _rank() -> int:
    """The rank of this process; 0 also where the variables that say it are the mistake."""
    try:
        return rank_here(os.environ) or 0
    except MoeRuntimeError:
        return 0


def _leave(code: int, message: str) -> None:
    """Tell the launcher, tell the user, and go."""
    message = redact(message)
    rank = _rank()
    if not leave_status(str(rank), code, message) and _is_to_speak(rank, code):
        tell_user(message)
    elif code == MoeRuntimeError.exit_code:
        leave_no_trace()
    else:
        note(message)
    with suppress(OSError):
        sys.stdout.flush()
    # Not sys.exit: after a failure other threads may wait for ranks that are gone.
    os._exit(code)
