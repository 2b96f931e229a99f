"""Wrong options and unknown commands, told in one line where typer and argparse would take several."""

import argparse
from typing import Any, NoReturn

import typer

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
        message = error.format_message()
        if not message or "\n" in message:
            # A group of commands without one: it has printed its help, or brings it as the message.
            print(message.rstrip())
            return int(error.exit_code)
        raise UsageMistake(f"{where}: {message} (see {where} --help)") from None
    return code if isinstance(code, int) else 0
