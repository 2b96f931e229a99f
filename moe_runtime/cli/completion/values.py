"""What a parameter of a command takes: names of configs, runs and clusters, keys of a config, files."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.config.roots import config_names


@dataclass(frozen=True)
class Candidate:
    """A word to offer. One that ends with `=`, `.`, `:` or `/` goes on: no space is to follow it."""

    word: str
    help: str = ""


@dataclass(frozen=True)
class Place:
    """Where in a command line the cursor is.

    Args:
        command: the command, with the group around it.
        arguments: those that stand before, without options.
        current: what has been typed of the word.
    """

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    current: str


def values_of(parameter: Any, place: Place) -> list[Candidate]:
    """What a parameter takes, as far as it begins as what has been typed."""
    kind = _KINDS.get(f"{place.command[-1]} {parameter.name}") or _KINDS.get(parameter.name)
    if kind is not None:
        return kind(place)
    return files(place) if "Path" in str(vars(parameter).get("type_descriptor")) else []


def files(place: Place) -> list[Candidate]:
    """Files and folders, as they were begun; folders end with a slash."""
    folder, _, begun = place.current.rpartition("/")
    shown = f"{folder}/" if "/" in place.current else ""
    try:
        with os.scandir(os.path.expanduser(shown) or ".") as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError:
        return []
    wanted = [(name, is_dir) for name, is_dir in found if name.startswith(begun)]
    return [
        Candidate(f"{shown}{name}{'/' if is_dir else ''}", "")
        for name, is_dir in wanted
        if begun or not name.startswith(".")
    ]


def words(*choices: str) -> Callable[[Place], list[Candidate]]:
    """A few fixed words."""
    return lambda place: _begun(choices, place)


def configs(place: Place) -> list[Candidate]:
    """Names of configs, run folders, and, once a path is begun, files of YAML."""
    named = _begun(config_names("run"), place, "run config")
    return [*named, *runs(place, (".yaml", ".yml"))]


def runs(place: Place, endings: tuple[str, ...] = ("",)) -> list[Candidate]:
    """Run folders below `runs`, and what else there is once something is begun or where there are none."""
    found = [str(file.parent) for file in sorted(Path("runs").glob("*/config.yaml"))]
    known = _begun(found, place, "run folder")
    if not place.current and (found or endings != ("",)):
        return known
    others = [one for one in files(place) if one.word.endswith(("/", *endings))]
    return [*known, *(one for one in others if one.word.rstrip("/") not in found)]


def overrides(place: Place) -> list[Candidate]:
    """Keys of a config, and behind `=` what the key takes."""
    from moe_runtime.cli.completion.override_keys import keys_and_values

    return keys_and_values(place)


def configs_or_overrides(place: Place) -> list[Candidate]:
    """Of `config diff`, whose configs each have overrides behind them."""
    return [*configs(place), *(overrides(place) if place.arguments else [])]


def sections(place: Place) -> list[Candidate]:
    """Sections and keys, of `config keys`."""
    from moe_runtime.cli.completion.override_keys import prefixes

    return prefixes(place.current)


def schedules(place: Place) -> list[Candidate]:
    """Names of schedules."""
    from moe_runtime.schedule import BUILDERS

    return _begun([*BUILDERS, "searched"], place)


def prepared(place: Place) -> list[Candidate]:
    """Folders of prepared data below `data`, and files."""
    found = [str(file.parent) for file in sorted(Path("data").glob("*/manifest.json"))]
    return [*_begun(found, place, "prepared data"), *(files(place) if place.current or not found else [])]


def sources(place: Place) -> list[Candidate]:
    """Sources of text, and files."""
    return [*_begun(("builtin:stdlib", "dir:", "glob:"), place), *files(place)]


def studies(place: Place) -> list[Candidate]:
    """Names of configs that have arms, and files."""
    return [*_begun([name for name in config_names("run") if "/" in name], place), *files(place)]


def clusters(place: Place) -> list[Candidate]:
    """Names of clusters, and files."""
    return [*_begun(config_names("cluster"), place, "cluster"), *(files(place) if place.current else [])]


def _begun(choices: Iterable[str], place: Place, said: str = "") -> list[Candidate]:
    return [Candidate(word, said) for word in choices if word.startswith(place.current)]


# By the name of a parameter; with its command before it where names alone would mislead.
_KINDS: dict[str, Callable[[Place], list[Candidate]]] = {
    "config": configs,
    "diff configs": configs_or_overrides,
    "overrides": overrides,
    "keys prefix": sections,
    "study": studies,
    "cluster": clusters,
    "path": runs,
    "paths": runs,
    "run": runs,
    "run_dir": runs,
    "first": runs,
    "second": runs,
    "schedule name": schedules,
    "data": prepared,
    "needle_data": prepared,
    "source": sources,
    "tokenizer": words("byte", "bpe:8192", "bpe:32000", "deepseek"),
    "device": words("cpu", "cuda"),
    "dtype": words("fp32", "bf16"),
    "wandb": words("online", "offline", "off"),
    "to": words("wandb", "tensorboard"),
    "needles": words("random", "taught"),
    "shell": words("bash", "zsh", "fish"),
}
