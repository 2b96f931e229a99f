"""Every key of a run, as a person reads it: what it takes, its default, what it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from moe_runtime.config.closest import closest
from moe_runtime.config.schema import RunConfig
from moe_runtime.config.suggest import KeyPath, key_paths, section_at
from moe_runtime.errors import ConfigError

_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_RANGES = {
    "minimum": "at least {:g}",
    "exclusiveMinimum": "above {:g}",
    "maximum": "at most {:g}",
    "exclusiveMaximum": "below {:g}",
    "multipleOf": "a multiple of {:g}",
}


@dataclass(frozen=True)
class Key:
    """A key that holds a value.

    Args:
        name: dotted; NAME stands for any name that a user gives, N for any place in a list.
        takes: kind and range, in words.
        choices: the words that it takes, if there are only so many.
        required: it has no default.
        default: None where it is required.
        description: what it is.
    """

    name: str
    takes: str
    choices: tuple[str, ...]
    required: bool
    default: Any
    description: str

    def fields(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self) | {"choices": list(self.choices)}


@cache
def all_keys() -> tuple[Key, ...]:
    """The keys of a run that hold values, section by section."""
    schema = RunConfig.model_json_schema()
    return tuple(_key(path, _property(path, schema), schema) for path in key_paths() if not _is_section(path))


def find_keys(prefix: str) -> list[Key]:
    """The keys below a prefix (`optim`, `layout.s`), or else those that speak of it.

    Raises:
        ConfigError: there are none.
    """
    keys, word = all_keys(), prefix.strip().rstrip(".").lower()
    found = [key for key in keys if f"{key.name}.".lower().startswith(f"{word}.")]
    found = found or [key for key in keys if key.name.lower().startswith(word)]
    found = found or [key for key in keys if word in f"{key.name} {key.description}".lower()]
    if not found:
        sections = [".".join(path) for path in key_paths()]
        near = closest(word, sections)
        hint = f"did you mean {near[0]}?" if near else f"sections: {', '.join(RunConfig.model_fields)}"
        raise ConfigError(
            f"{prefix}: expected a key, a section or a word about one, got none of them; {hint}"
        )
    return found


def choices_of(path: KeyPath) -> tuple[str, ...]:
    """The words that a key takes; none if it is not there or takes anything."""
    name = ".".join(path)
    return next((key.choices for key in all_keys() if key.name == name), ())


def _is_section(path: KeyPath) -> bool:
    return section_at((*path, "one")) is not None or section_at(path) is not None


def _property(path: KeyPath, schema: dict[str, Any]) -> dict[str, Any]:
    """The part of the JSON schema that is about a key."""
    part = schema
    for word in path:
        section = _resolved(part, schema)
        part = section["properties"][word] if "properties" in section else one_of_several(section)
    return part


def one_of_several(part: Mapping[str, Any]) -> dict[str, Any]:
    """What each of several things under a key has to be, in a list or by name; empty for other parts."""
    named = list(part.get("patternProperties", {}).values()) or [part.get("additionalProperties")]
    each = part.get("items", named[0])
    return each if isinstance(each, dict) else {}


def _resolved(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """Follows references, and leaves null aside, down to the section."""
    if "$ref" in part:
        return _resolved(schema["$defs"][part["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in part:
        return _resolved(next(one for one in part["anyOf"] if one.get("type") != "null"), schema)
    return part


def _key(path: KeyPath, part: dict[str, Any], schema: dict[str, Any]) -> Key:
    section = section_at(path[:-1])
    assert section is not None, path
    info = section.model_fields[path[-1]]
    default = _default(path)
    return Key(
        name=".".join(path),
        takes=words_of(part, schema),
        choices=_choices(part),
        required=info.is_required(),
        default=list(default) if isinstance(default, tuple) else default,
        description=info.description or "",
    )


def _default(path: KeyPath) -> Any:
    """What a key is unless something else is said: its section's default may say so before the key itself."""
    holder: BaseModel | None = None
    value: Any = None
    for place, word in enumerate(path):
        section = section_at(path[:place])
        if holder is not None:
            value = getattr(holder, word)
        elif section is not None:
            info = section.model_fields[word]
            value = None if info.is_required() else info.get_default(call_default_factory=True)
        holder = value if isinstance(value, BaseModel) else None
    return value


def words_of(part: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a part of the JSON schema takes, in words."""
    if "$ref" in part:
        return f"section of {', '.join(schema['$defs'][part['$ref'].rpartition('/')[2]]['properties'])}"
    if "anyOf" in part:
        return " or ".join(words_of(one, schema) for one in part["anyOf"])
    if "enum" in part:
        return f"one of {', '.join(map(str, part['enum']))}"
    if "const" in part:
        return str(part["const"])
    if part.get("type") == "null":
        return "null"
    if part.get("type") == "array":
        each = part.get("prefixItems") or [part.get("items", {})]
        number = f"{len(each)} x " if "prefixItems" in part else ""
        return f"list of {number}{words_of(each[0], schema)}"
    if one_of_several(part):
        return f"sections by name, each a {words_of(one_of_several(part), schema)}"
    word = _WORDS.get(str(part.get("type")), "any value")
    if "minimum" in part and "maximum" in part:
        return f"{word}, {part['minimum']:g} to {part['maximum']:g}"
    ranges = [text.format(part[name]) for name, text in _RANGES.items() if name in part]
    return ", ".join([word, *ranges])


def _choices(part: Mapping[str, Any]) -> tuple[str, ...]:
    if "anyOf" in part:
        return tuple(word for one in part["anyOf"] for word in _choices(one))
    if part.get("type") == "array":
        return _choices(part.get("items", {}))
    simple = {"boolean": ("true", "false"), "null": ("null",)}
    return simple.get(str(part.get("type")), tuple(str(word) for word in part.get("enum", ())))
