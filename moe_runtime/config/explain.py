"""Turns what pydantic found into findings that a user can act on."""

from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from moe_runtime.config.closest import did_you_mean
from moe_runtime.config.finding import Finding, FindingsError
from moe_runtime.config.suggest import meant_by, section_at, suggest_key

# What each kind of pydantic error expected; `{}` fields come from the error's context.
_EXPECTED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "truth_value": "a number or a word, not a truth value",
    "literal_error": "one of {expected}",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of:g}",
    "string_pattern_mismatch": "text of the form {pattern}",
    "model_type": "a section (keys and values)",
    "model_attributes_type": "a section (keys and values)",
    "tuple_type": "a list",
    "too_short": "a list of {min_length}",
    "too_long": "a list of {max_length}",
}
_RANGES = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "multiple_of")


def explain(error: ValidationError, of_run: bool = True) -> list[Finding]:
    """One finding for each mistake; keys are dotted paths from the run.

    Args:
        of_run: false for a file of another kind, to whose keys those of a run are no help.
    """
    items = error.errors()
    # A key that is there under a wrong name is told once, as the one that it was meant to be.
    meant = {key for item in items if of_run and _is_unknown(item) for key in meant_by(_path(item))[:1]}
    told = [item for item in items if item["type"] != "missing" or _path(item) not in meant]
    return [finding for item in told for finding in _explain_one(item, of_run)]


def _is_unknown(item: Mapping[str, Any]) -> bool:
    return bool(item["type"] == "extra_forbidden")


def _path(item: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(part) for part in item["loc"])


def _explain_one(item: Mapping[str, Any], of_run: bool) -> list[Finding]:
    path = _path(item)
    key = ".".join(path)
    context = item.get("ctx", {})
    cause = context.get("error")
    if isinstance(cause, FindingsError):
        return [Finding(f"{key}.{inner.key}" if key else inner.key, inner.text) for inner in cause.findings]
    if _is_unknown(item):
        return [Finding(key, f"unknown key{suggest_key(path, item['input']) if of_run else ''}")]
    if item["type"] == "missing":
        if path[-1].isdigit():
            return [Finding(".".join(path[:-1]), "expected a list with more values")]
        return [Finding(key, "required key is missing")]
    wanted = _EXPECTED.get(item["type"])
    if wanted is None:
        return [Finding(key, f"{item['msg']}, got {describe(item['input'])}")]
    hint = ""
    if item["type"] == "literal_error":
        hint = _suggest_word(item["input"], context)
    elif item["type"] in _RANGES and of_run:
        hint = _suggest_default(path)
    elif item["type"] in ("tuple_type", "list_type"):
        hint = _suggest_list(key, item["input"])
    return [Finding.expected(key, wanted.format(**context), describe(item["input"]) + hint)]


def describe(value: Any) -> str:
    """A value as a user would recognise it, with its type where that is the point."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"text {_short(value)}"
    if isinstance(value, dict):
        return f"a section with keys {', '.join(map(str, value)) or 'none'}"
    if isinstance(value, list | tuple):
        return f"the list {_short(list(value))}"
    return str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def _suggest_word(value: Any, context: Mapping[str, Any]) -> str:
    words = [word.strip("' ") for word in str(context.get("expected", "")).replace(" or ", ",").split(",")]
    return did_you_mean(str(value), words)


def _suggest_list(key: str, value: Any) -> str:
    """The whole list as an override, where a part was given by its number (`alerts.custom.0.name=x`)."""
    if not isinstance(value, dict) or not value or not all(str(part).isdigit() for part in value):
        return ""
    whole = yaml.safe_dump(list(value.values()), default_flow_style=True, sort_keys=False, width=10_000)
    return f"; give the whole list, such as '{key}={whole.strip()}'"


def _suggest_default(path: tuple[str, ...]) -> str:
    """`; the default is X` for a key, or a number in a list, that has one."""
    while path and path[-1].isdigit():
        path = path[:-1]
    section = section_at(path[:-1])
    info = section.model_fields.get(path[-1]) if section is not None else None
    default = None if info is None else info.get_default(call_default_factory=True)
    if not isinstance(default, int | float | tuple):
        return ""
    return f"; the default is {list(default) if isinstance(default, tuple) else default}"
