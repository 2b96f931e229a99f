"""The `moe-runtime` command: registers the sub-commands, and turns errors into one line and a code."""

import os
import sys
import time
import traceback
from typing import NoReturn

import typer

from moe_runtime.cli import (
    bench,
    cache,
    checkpoint,
    compare,
    config,
    context,
    convert,
    convert_tasks,
    evaluate,
    generate,
    launch,
    prepare,
    schedule,
    train,
)
from moe_runtime.cli.ablate import command as ablate
from moe_runtime.cli.chaos import command as chaos
from moe_runtime.cli.launchers.environment import rank_here
from moe_runtime.cli.plan import command as plan
from moe_runtime.cli.supervise.outcome import leave_status
from moe_runtime.cli.usage import run_typer
from moe_runtime.config.secrets import redact
from moe_runtime.errors import MoeRuntimeError

app = typer.Typer(
    help="Train Mixture-of-Experts language models of the DeepSeek-V3 kind.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train")(train.train)
app.command("prepare")(prepare.prepare)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command("launch", context_settings={"ignore_unknown_options": True, "help_option_names": []})(
    launch.as_command
)
app.command("ablate")(ablate.ablate)
app.command("plan")(plan.plan)
app.command("chaos")(chaos.chaos)
app.command("schedule")(schedule.schedule)
app.command("compare")(compare.compare)
convert.app.command("tasks")(convert_tasks.tasks)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")
app.add_typer(context.app, name="context")
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Run one command; a user's mistake ends with its message alone and exit code 2."""
    try:
        code = _launched() if _is_to_launch(sys.argv[1:]) else run_typer(app, "moe-runtime")
    except KeyboardInterrupt:
        _leave(130, "interrupted before there was anything to save")
    except MoeRuntimeError as error:
        _leave(error.exit_code, str(error))
    except Exception:
        _leave(1, traceback.format_exc())
    else:
        if "RANK" not in os.environ:
            sys.exit(code)
        # A rank leaves at once: gloo groups that outlive the interpreter abort a good run now and then.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _is_to_speak(rank: int, code: int) -> bool:
    """Whether this rank tells what ended it, where no launcher of ours does.

    A mistake is mostly that of all ranks, and rank 0 tells it. The others give it time, for mpiexec and
    torchrun end all after the first; a mistake of one machine is then told by the first rank there.
    """
    if rank == 0 or code != MoeRuntimeError.exit_code:
        return True
    time.sleep(_RANK_0_SPEAKS_S)
    return os.environ.get("LOCAL_RANK") == "0"


_RANK_0_SPEAKS_S = 3.0


def _is_to_launch(arguments: list[str]) -> bool:
    """Whether this process is to start the ranks of a command, not to be one."""
    if rank_here(os.environ) is not None:
        return False
    wants_several = any(word.partition("=")[0] == "--ep" for word in arguments)
    return arguments[:1] == ["train"] or (arguments[:1] == ["generate"] and wants_several)


def _launched() -> NoReturn:
    launch.leave(launch.main(program="moe-runtime"))


def _leave(code: int, message: str) -> None:
    """Tell the launcher, tell the user, and go."""
    message = redact(message)
    rank = rank_here(os.environ) or 0
    if not leave_status(str(rank), code, message) and _is_to_speak(rank, code):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: after a failure other threads may wait for ranks that are gone.
    os._exit(code)
