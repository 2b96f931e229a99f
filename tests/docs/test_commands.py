"""Every command in the documents is one of ours, with options and override keys that exist."""

import argparse
import re
from pathlib import Path

import click
import pytest
import typer

from moe_runtime.cli.app import app
from moe_runtime.cli.launch_options import launch_parser
from tests.docs.pages import PAGES, commands_of, name_of
from tests.docs.test_links import key_exists

_OVERRIDE = re.compile(r"^([a-z_0-9]+(?:\.[a-z_0-9]+)*)=")
_SCRIPT_ALONE = ("help", "test")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_options_and_keys_exist(page: Path) -> None:
    problems = [f"{shown}: {problem}" for shown, words in commands_of(page) for problem in _problems(words)]
    assert not problems, "\n".join(problems)


def test_the_documents_show_every_command() -> None:
    shown = {words[0] for page in PAGES for _, words in commands_of(page) if words}
    top = typer.main.get_command(app)
    assert isinstance(top, click.Group) or hasattr(top, "list_commands")
    names = set(top.list_commands(click.Context(click.Command("moe-runtime"))))
    assert names - shown - {word for words in shown for word in words.split("|")} == set()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian", "x"], "no command trian"),
        (["train", "x", "--fresher"], "no option --fresher"),
        (["--node", "2", "train", "x"], "no launcher option --node"),
        (["train", "x", "optim.peak_rl=1"], "no key optim.peak_rl"),
        (["checkpoint", "ls|verfy", "x"], "no command verfy"),
        (["launch", "--mpy", "train", "x"], "no launcher option --mpy"),
    ],
)
def test_a_planted_mistake_is_found(words: list[str], says: str) -> None:
    assert _problems(words) == [says]


def _problems(words: list[str]) -> list[str]:
    words = [word.strip("[]") for word in words]
    words = [word for word in words if word and word != "..."]
    known = _option_names(launch_parser("x"))
    while words and words[0].startswith("--"):
        name, equals, _ = words[0].partition("=")
        if name not in (*known, "--help", "--version"):
            return [f"no launcher option {name}"]
        takes_value = not equals and known.get(name, False)
        words = words[2 if takes_value else 1 :]
    if not words or words[0] in _SCRIPT_ALONE or not re.match(r"^[a-z]", words[0]):
        return []  # the program alone, or a placeholder such as COMMAND
    if words[0] == "launch":
        return _problems(words[1:])
    return _problems_of_command(typer.main.get_command(app), words)


def _option_names(parser: argparse.ArgumentParser) -> dict[str, bool]:
    """Each option, and whether a value follows."""
    return {name: action.nargs != 0 for action in parser._actions for name in action.option_strings}


def _problems_of_command(group: click.Command, words: list[str]) -> list[str]:
    problems = []
    for word in words[0].split("|"):
        found = group.get_command(click.Context(group), word)  # type: ignore[attr-defined]
        if found is None:
            problems.append(f"no command {word}")
        elif hasattr(found, "list_commands") and len(words) > 1 and re.match(r"^[a-z]", words[1]):
            problems += _problems_of_command(found, words[1:])
        elif not hasattr(found, "list_commands"):
            problems += _problems_of_words(found, words[1:])
    return problems


def _problems_of_words(command: click.Command, words: list[str]) -> list[str]:
    options = {"--help"} | {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    problems = []
    for word in words:
        for part in word.split("|") if word.startswith("--") else []:
            name = part.partition("=")[0]
            if name not in options:
                problems.append(f"no option {name}")
        match = _OVERRIDE.match(word)
        if match and "overrides" in options and match[1] != "a.b" and not key_exists(match[1]):
            problems.append(f"no key {match[1]}")
    return problems
