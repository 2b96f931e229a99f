"""Where each value of a run comes from: a line of a file, an override, or the default."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.config.load import load_config, read_tree

DEFAULT = "default"


def leaves(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a nested dict with their dotted paths; an empty section is a value."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def origins(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, tuple[Any, str]]:
    """Value and place of every key of a run.

    Raises:
        ConfigError: it is no valid run.
    """
    run = load_config(path, overrides)
    tree, file = read_tree(path, overrides)
    given = dict(leaves(tree.values))
    return {
        key: (value, tree.place(tuple(key.split(".")), file) if _is_given(key, given) else DEFAULT)
        for key, value in leaves(run.model_dump(mode="json"))
    }


def _is_given(key: str, given: dict[str, Any]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in given)
