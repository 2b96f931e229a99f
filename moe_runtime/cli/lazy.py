"""Commands that are imported when they are run, helped with or completed, not before.

A command brings its room of the house with it, and some rooms bring numpy or scipy: with all of them
imported, `--help` of one took a second, and shell completion would have been too slow to use.
"""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from moe_runtime.config.closest import closest


class NearGroup(TyperGroup):
    """A group that answers an unknown command with the one that comes close."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that the first word names.

        Raises:
            UsageError: typer's own; there is none.
        """
        word = args[0]
        if word.startswith("-") or self.get_command(ctx, word) is not None:
            return super().resolve_command(ctx, args)
        names = self.list_commands(ctx)
        near = closest(word, names)
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}"
        return ctx.fail(f"no such command {word!r}; {hint}")


class LazyGroup(NearGroup):
    """A group whose commands are named by `module:attribute`: a function, or a `typer.Typer` of several."""

    places: Mapping[str, str] = {}
    unlisted: Mapping[str, str] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands, without importing them."""
        return list(self.places)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a name, imported now; None if there is none."""
        place = self.places.get(cmd_name) or self.unlisted.get(cmd_name)
        if cmd_name not in self.commands and place is not None:
            self.commands[cmd_name] = load(cmd_name, place)
        return self.commands.get(cmd_name)


def lazy_app(
    callback: Callable[..., None], places: Mapping[str, str], unlisted: Mapping[str, str]
) -> typer.Typer:
    """A program of commands that are imported when they are needed.

    Args:
        callback: has the program's own options as parameters, and its help as docstring.
        places: `module:attribute` of each command.
        unlisted: the same of commands that no help lists.
    """
    group = type("Commands", (LazyGroup,), {"places": places, "unlisted": unlisted})
    program = typer.Typer(
        cls=group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    program.callback()(callback)
    return program


def load(name: str, place: str) -> Any:
    """The command at `module:attribute`, as typer runs it."""
    module, _, attribute = place.partition(":")
    found = getattr(import_module(module), attribute)
    if isinstance(found, typer.Typer):
        found.info.cls, found.rich_markup_mode = NearGroup, None
        group = typer.main.get_group(found)
        group.name = name
        return group
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    alone.command(name)(found)
    return typer.main.get_command(alone)
