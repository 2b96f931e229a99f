"""The JSON schema of a config file, for editors that complete and check YAML.

A file is not a run: what it leaves out may come from its bases, and it has the key `bases`. And editors
read YAML 1.2, to which `950_000` is text, so numbers may be written as text of that form. Everything else is
as the run itself has it, unknown keys refused.
"""

from typing import Any

from moe_runtime.config.keys import one_of_several
from moe_runtime.config.schema import RunConfig

_NUMBERS = {
    "integer": r"^[-+]?[0-9][0-9_]*([eE][+]?[0-9]+)?$",
    "number": r"^[-+]?[0-9._]+([eE][-+]?[0-9]+)?$",
}
_BASES = {
    "type": "array",
    "items": {"type": "string"},
    "description": "files that this one is laid over, such as model/tiny.yaml; relative to it or configs/",
}


def run_schema() -> dict[str, Any]:
    """What a run is once everything is resolved, as `config.yaml` of a run folder."""
    return RunConfig.model_json_schema() | {"title": "A resolved run of moe_runtime"}


def file_schema() -> dict[str, Any]:
    """What may stand in a config file."""
    schema: dict[str, Any] = _loosened(RunConfig.model_json_schema())
    schema["properties"] = {"bases": _BASES, **schema["properties"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "A config file of moe_runtime",
    }


def _loosened(part: Any) -> Any:
    """A part of a schema without what is required, with numbers as text and the short forms of lists."""
    if isinstance(part, list):
        return [_loosened(item) for item in part]
    if not isinstance(part, dict):
        return part
    loose = {key: _loosened(value) for key, value in part.items() if key not in ("required", "title")}
    if part.get("type") in _NUMBERS:
        return _or(loose, {"type": "string", "pattern": _NUMBERS[part["type"]]})
    if part.get("type") == "array" and "enum" in part.get("items", {}):
        return _or(loose, loose["items"])  # a list of one word may be the word
    if part.get("type") == "object" and "$ref" in one_of_several(part):
        # A list of them may stand instead, each with its `name`: too loose to check what else it holds.
        return _or(loose, {"type": "array", "items": {"type": "object"}})
    return loose


def _or(part: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Either of two parts; what is said of the key stays outside, where editors look for it."""
    said = {key: value for key, value in part.items() if key in ("description", "default")}
    rest = {key: value for key, value in part.items() if key not in said}
    return {**said, "anyOf": [rest, other]}
