"""Wrong options and unknown commands, told in one line where typer and argparse would take several."""

import argparse
from collections.abc import Iterable
from typing import Any, NoReturn

import typer

from moe_runtime.config.closest import closest
from moe_runtime.errors import MoeRuntimeError

# typer has carried its own copy of click for some versions; its public name leads to the right base.
_TyperUsageError: type[Any] = typer.BadParameter.__mro__[1]


class UsageMistake(MoeRuntimeError):
    """The command line itself is wrong: an unknown command or option, or a missing value."""


class OneLineParser(argparse.ArgumentParser):
    """Raises `UsageMistake` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Tells what is wrong, and where help is."""
        raise UsageMistake(f"{self.prog}: {message} (see {self.prog} --help)")


def run_typer(app: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """Runs a typer program; returns its exit code.

    Args:
        app: the program.
        program: its name in messages.
        arguments: None: those of this process.

    Raises:
        UsageMistake: unknown command or option, or a missing or wrong value; one line.
    """
    try:
        code = app(arguments, prog_name=program, standalone_mode=False)
    except _TyperUsageError as error:
        where = error.ctx.command_path if error.ctx is not None else program
        if type(error).__name__ == "NoArgsIsHelpError":
            # A group of commands without one: it has printed its help, or brings it as the message.
            print(error.format_message().rstrip())
            return int(error.exit_code)
        message = " ".join(_message(error).split())
        raise UsageMistake(f"{where}: {message} (see {where} --help)") from None
    return code if isinstance(code, int) else 0


def _message(error: Any) -> str:
    """What is wrong, with the option or the command that comes close to one that is not there."""
    option = getattr(error, "option_name", None)
    if error.ctx is None or option is None or "No such option" not in error.format_message():
        return str(error.format_message()).rstrip(".")
    return f"no such option {option}{near_option(option, options_of(error.ctx.command))}"


def options_of(command: Any) -> list[str]:
    """All options of a command, `--help` included."""
    named = [name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    return [*(name for name in named if name.startswith("-")), "--help"]


def near_option(option: str, options: Iterable[str]) -> str:
    """`; did you mean X?` with the options that come close, or what there is."""
    names = list(options)
    near = closest(option, names)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(sorted(names))}"
