"""The `moe-runtime` command: registers the sub-commands, and turns errors into one line and a code."""

import os
import sys
import traceback

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
    metrics,
    prepare,
    report,
    schedule,
    train,
)
from moe_runtime.cli.ablate import command as ablate
from moe_runtime.cli.chaos import command as chaos
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
app.command("ablate")(ablate.ablate)
app.command("plan")(plan.plan)
app.command("chaos")(chaos.chaos)
app.command("schedule")(schedule.schedule)
app.command("compare")(compare.compare)
app.command("report")(report.report)
convert.app.command("tasks")(convert_tasks.tasks)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")
app.add_typer(context.app, name="context")
app.add_typer(convert.app, name="convert")
app.add_typer(bench.app, name="bench")
app.add_typer(metrics.app, name="metrics")


def main() -> None:
    """Run one command; a user's mistake ends with its message alone and exit code 2."""
    try:
        code = run_typer(app, "moe-runtime")
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


def _leave(code: int, message: str) -> None:
    """Tell the launcher, tell the user (rank 0 for what all ranks decide alike), and go."""
    message = redact(message)
    rank = os.environ.get("RANK", "0")
    if not leave_status(rank, code, message) and (rank == "0" or code != MoeRuntimeError.exit_code):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: after a failure other threads may wait for ranks that are gone.
    os._exit(code)
