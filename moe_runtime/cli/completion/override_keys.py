"""Overrides: `a.b=` one section at a time, and behind `=` the words that the key takes, or its value now."""

import json

from moe_runtime.cli.completion.values import Candidate, Place
from moe_runtime.config.keys import Key, all_keys
from moe_runtime.config.origins import leaves
from moe_runtime.errors import ConfigError


def keys_and_values(place: Place) -> list[Candidate]:
    """Keys that begin as what was typed, or the values of the key before `=`."""
    name, equals, begun = place.current.partition("=")
    if equals:
        return _values(name, begun, place.arguments)
    return _keys(place.current, "=")


def prefixes(begun: str) -> list[Candidate]:
    """The same keys as plain words, of `config keys`."""
    return _keys(begun, "")


def _keys(begun: str, end: str) -> list[Candidate]:
    """Keys and sections one level below what was typed; a word within a key finds the whole of it."""
    keys = [key for key in all_keys() if "NAME" not in key.name and ".N." not in key.name]
    depth = begun.count(".")
    found: dict[str, str] = {}
    for key in keys:
        if key.name.startswith(begun):
            parts = key.name.split(".")
            is_leaf = len(parts) == depth + 1
            word = key.name + end if is_leaf else ".".join(parts[: depth + 1]) + "."
            found.setdefault(word, _said(key) if is_leaf else "section")
    if not found and begun:
        found = {key.name + end: _said(key) for key in keys if key.name.rpartition(".")[2].startswith(begun)}
    return [Candidate(word, said) for word, said in found.items()]


def _said(key: Key) -> str:
    return f"{key.takes}. {key.description}"


def _values(name: str, begun: str, arguments: tuple[str, ...]) -> list[Candidate]:
    key = next((one for one in all_keys() if one.name == name), None)
    if key is None:
        return []
    if len(key.choices) > 1:
        choices = dict.fromkeys(key.choices, "")
    else:
        choices = dict.fromkeys((*_value_now(name, arguments), *key.choices), "value now")
    return [Candidate(f"{name}={word}", said) for word, said in choices.items() if word.startswith(begun)]


def _value_now(name: str, arguments: tuple[str, ...]) -> list[str]:
    """What the config that is being overridden has, if it is one."""
    from moe_runtime.config.load import load_config

    if not arguments:
        return []
    configs = [place for place, word in enumerate(arguments) if "=" not in word]
    if not configs:
        return []
    try:
        run = load_config(arguments[configs[-1]], arguments[configs[-1] + 1 :])
    except ConfigError:
        return []
    value = dict(leaves(run.model_dump(mode="json"))).get(name)
    return [value if isinstance(value, str) else json.dumps(value)] if value is not None else []
