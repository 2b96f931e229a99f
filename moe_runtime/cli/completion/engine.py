"""What a command line may go on with: commands, options, and what each of them takes.

Shells differ in how they cut a line into words (bash cuts at `=`), how they quote and what they do with a
space after a word. So the scripts of `scripts.py` are thin: they hand over the words up to the cursor, and
get whole words back, names of files among them. Typer's own completion was rejected: under bash it sees
`optim.peak_lr=1` as three words, and it cannot know what an argument takes from those before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import typer

from moe_runtime.cli.completion.values import Candidate, Place, values_of

_LAUNCHER = "launch"


@dataclass(frozen=True)
class _Open:
    """A command of which some words have been given.

    Args:
        arguments: the words given for its arguments.
        used: options that were given.
        waiting: the option whose value comes next, if one does.
    """

    arguments: tuple[str, ...]
    used: frozenset[str]
    waiting: Any


def complete(program: typer.Typer, words: Sequence[str], current: str) -> list[Candidate]:
    """The words that the current one may become.

    Args:
        program: the command line.
        words: those before, without the name of the program.
        current: what has been typed of this one; may be empty.
    """
    node: Any = typer.main.get_command(program)
    path: list[str] = []
    rest = list(words)
    while hasattr(node, "list_commands"):
        if _LAUNCHER in path[-1:] or not path:
            rest = past_launcher(rest)
        name = next((word for word in rest if not word.startswith("-")), None)
        if name is None:
            launching = _launcher_options(current) if not path or _LAUNCHER in path else []
            return [*_commands(node, current), *_options(node, frozenset(), current), *launching]
        node = node.get_command(None, name)
        rest, path = rest[rest.index(name) + 1 :], [*path, name]
        if node is None:
            return []
        if name == _LAUNCHER:
            node = typer.main.get_command(program)
    return _of_command(node, path, rest, current)


def _of_command(command: Any, path: list[str], words: list[str], current: str) -> list[Candidate]:
    given = _read(command, words)
    place = Place(tuple(path), given.arguments, current)
    option, equals, value = current.partition("=")
    if given.waiting is not None:
        return values_of(given.waiting, place)
    if current.startswith("--") and equals:
        named = next((one for one in command.params if option in one.opts), None)
        found = [] if named is None else values_of(named, Place(tuple(path), given.arguments, value))
        return [Candidate(f"{option}={one.word}", one.help) for one in found]
    if current.startswith("-"):
        return _options(command, given.used, current)
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    if not arguments:
        return _options(command, given.used, current)
    last = arguments[min(len(given.arguments), len(arguments) - 1)]
    if len(given.arguments) >= len(arguments) and last.nargs == 1:
        return _options(command, given.used, current) if not current else []
    return values_of(last, place)


def _read(command: Any, words: list[str]) -> _Open:
    """What has been given of a command."""
    options = {name: one for one in command.params for name in (*one.opts, *one.secondary_opts)}
    arguments, used, waiting = [], set(), None
    for word in words:
        if waiting is not None:
            waiting = None
            continue
        name, equals, _ = word.partition("=")
        if word.startswith("-") and name in options:
            option = options[name]
            used |= set() if option.multiple else {*option.opts, *option.secondary_opts}
            waiting = None if option.is_flag or equals else option
        elif not word.startswith("-"):
            arguments.append(word)
    return _Open(tuple(arguments), frozenset(used), waiting)


def _launch_options() -> dict[str, tuple[bool, str]]:
    """The options of the launcher, which come before `train`: whether each has a value, and what it is."""
    from moe_runtime.cli.launch_options import launch_parser

    actions = launch_parser("launch.sh")._actions
    return {flag: (one.nargs != 0, one.help or "") for one in actions for flag in one.option_strings}


def past_launcher(words: list[str]) -> list[str]:
    """The words after the options of the launcher, whose values would be taken for commands."""
    options = _launch_options()
    while words and words[0] in options:
        words = words[2:] if options[words[0]][0] else words[1:]
    return words


def _launcher_options(current: str) -> list[Candidate]:
    options = _launch_options().items() if current.startswith("-") else ()
    return [
        Candidate(flag, said) for flag, (_, said) in options if flag.startswith(current) and flag != "--help"
    ]


def _commands(group: Any, current: str) -> list[Candidate]:
    names = [name for name in group.list_commands(None) if name.startswith(current)]
    return [Candidate(name, _first(group.get_command(None, name))) for name in names]


def _first(command: Any) -> str:
    return str(command.get_short_help_str(80))


def _options(command: Any, used: frozenset[str], current: str) -> list[Candidate]:
    """Options that are not used up; only where one has been begun, or nothing else can be said."""
    if not current.startswith("-") and hasattr(command, "list_commands"):
        return []
    found = [
        Candidate(name, one.help or "")
        for one in command.params
        if one.param_type_name == "option" and not getattr(one, "hidden", False)
        for name in (*one.opts, *one.secondary_opts)
        if name.startswith(current or "-") and name not in used
    ]
    return [*found, *([Candidate("--help", "show help")] if "--help".startswith(current) else [])]
