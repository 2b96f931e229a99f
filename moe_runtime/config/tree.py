"""YAML files, their bases and dotted overrides, merged as plain dicts that remember where each key stood.

A `Tree` is a dict of plain values beside the place of every key path in it. Files are composed to YAML
nodes first, not loaded: nodes know their lines and still hold duplicate keys, which a loaded dict has
already lost. Mistakes are collected, so that one run tells all of them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moe_runtime.errors import ConfigError

KeyPath = tuple[str, ...]


class _Loader(yaml.SafeLoader):
    """Safe loader that reads `1e-4` and `469e9` as numbers, text in YAML 1.1, and dates as text."""


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes text which `_Loader` would read as a number."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_POWER = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(*_POWER)
_Dumper.add_implicit_resolver(*_POWER)
# Line ends to YAML 1.1, which PyYAML writes as they are and reads back as line feeds; escapes keep them.
_RARE_BREAKS = ("\x85", "\u2028", "\u2029")


def dump_text(values: dict[str, Any]) -> str:
    """Plain values as YAML that `parse_text` reads back to the same."""
    text = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if any(mark in text for mark in _RARE_BREAKS):
        return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
    return text


@dataclass
class Tree:
    """Plain values, the place (`file:line` or `override`) of each key path, and the mistakes found."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, str] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def merge(self, other: "Tree") -> None:
        """Lays another tree over this one: sections are merged, everything else is replaced.

        A merged section keeps its place, so that an override of one key of it does not take the blame
        for those that are missing.
        """
        self._lay(self.values, other.values, other.places, ())
        self.mistakes.extend(other.mistakes)

    def _lay(
        self, under: dict[str, Any], over: dict[str, Any], places: dict[KeyPath, str], path: KeyPath
    ) -> None:
        for key, value in over.items():
            here = (*path, key)
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                self._lay(under[key], value, places, here)
            else:
                under[key] = value
                self.places.update({p: place for p, place in places.items() if p[: len(here)] == here})

    def place(self, path: KeyPath, default: str) -> str:
        """Where a key stood, or the nearest section around it, or `default`."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return default


def shown(path: Path) -> str:
    """The path as a user would type it: relative to where they are, if it is below."""
    here = Path.cwd()
    resolved = path.resolve()
    return str(resolved.relative_to(here) if resolved.is_relative_to(here) else resolved)


def read_file(path: Path, find_base: Callable[[str, Path], Path], seen: tuple[Path, ...] = ()) -> Tree:
    """Reads a config file with all its bases, left to right, its own keys last.

    Args:
        path: the file.
        find_base: turns an entry of `bases` and the file that names it into a path.
        seen: files that are being read around this one.

    Raises:
        ConfigError: a file is missing, is no YAML, or is a base of itself; one line each.
    """
    if path.resolve() in seen:
        circle = " -> ".join(shown(file) for file in (*seen, path))
        raise ConfigError(f"{shown(path)}: bases: a file cannot be its own base: {circle}")
    own = _parse_file(path)
    tree, fatal = Tree(), []
    for name in _bases_of(own, path):
        try:
            tree.merge(read_file(find_base(name, path), find_base, (*seen, path.resolve())))
        except ConfigError as error:
            fatal.append(str(error))
    if fatal:
        raise ConfigError("\n".join(fatal))
    tree.merge(own)
    return tree


def _bases_of(own: Tree, path: Path) -> list[str]:
    bases = own.values.pop("bases", None) or []
    place = own.places.pop(("bases",), shown(path))
    if not isinstance(bases, list) or not all(isinstance(name, str) for name in bases):
        raise ConfigError(f"{place}: bases: expected a list of files, got {bases!r}")
    return bases


def _parse_file(path: Path) -> Tree:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown(path)}: cannot be read as a text file: {error}") from None
    try:
        return parse_text(text, lambda line: f"{shown(path)}:{line}")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{shown(path)}:{mark.line + 1}" if mark else shown(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{place}: is not valid YAML: {problem}") from None
    except RecursionError:
        raise ConfigError(f"{shown(path)}: sections and lists are nested too deep") from None


def parse_text(text: str, place_of: Callable[[int], str]) -> Tree:
    """Parses one YAML document whose top is a mapping; an empty one is an empty mapping.

    Args:
        text: the document.
        place_of: names the place of a line, counted from 1.

    Raises:
        ConfigError: it is a list or a word.
        yaml.YAMLError: it is no YAML, or uses tags or types beyond plain ones.
        RecursionError: it is nested very deep, or holds itself by an alias.
    """
    tree = Tree()
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            tree.values = _mapping(node, loader, (), tree, place_of)
        elif node is not None:
            place = place_of(node.start_mark.line + 1)
            got = "a list" if isinstance(node, yaml.SequenceNode) else f"text {str(node.value)[:80]!r}"
            raise ConfigError(f"{place}: expected sections and keys, got {got}")
    finally:
        loader.dispose()  # type: ignore[no-untyped-call]
    return tree


def _mapping(
    node: yaml.MappingNode, loader: _Loader, path: KeyPath, tree: Tree, place_of: Callable[[int], str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = place_of(key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            tree.mistakes.append(f"{place}: expected a word as key, got a list or a section")
            continue
        key = str(key_node.value)
        here = (*path, key)
        if key in values:
            tree.mistakes.append(
                f"{place}: {'.'.join(here)}: stands here twice, first at {tree.places[here]}"
            )
        tree.places[here] = place
        if isinstance(value_node, yaml.MappingNode):
            values[key] = _mapping(value_node, loader, here, tree, place_of)
        else:
            try:
                values[key] = loader.construct_object(value_node, deep=True)  # type: ignore[no-untyped-call]
            except (ValueError, TypeError) as error:
                tree.mistakes.append(f"{place}: {'.'.join(here)}: is not a value in YAML: {error}")
                values[key] = value_node.value
    return values


def read_overrides(overrides: tuple[str, ...]) -> Iterator[Tree]:
    """Turns `a.b=c` into trees, one each; the value is YAML, so `[1, 3]`, `null` and `1e-4` work."""
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if "\udc80" <= max(override, default="") <= "\udcff":  # what is no UTF-8 reaches us as these
            yield Tree(mistakes=[f"override: expected text in UTF-8, got {override!r}"])
            continue
        if not equals or not all(path):
            mistake = f"override: expected key=value, such as optim.peak_lr=1e-3, got {override!r}"
            yield Tree(mistakes=[mistake])
            continue
        try:
            # The indent and the line break let the value be any YAML, a flow list as much as a word.
            tree = parse_text(f"value: {text}\n", lambda line: "override")
        except (yaml.YAMLError, RecursionError):
            yield Tree(mistakes=[f"override: {key}: expected a value in YAML, got {text!r}"])
            continue
        yield _at(path, tree)


def _at(path: KeyPath, tree: Tree) -> Tree:
    values: Any = tree.values["value"]
    places = {(*path, *inner[1:]): place for inner, place in tree.places.items()}
    for depth in range(len(path), 0, -1):
        values = {path[depth - 1]: values}
        places[path[:depth]] = "override"
    return Tree(values, places, tree.mistakes)
