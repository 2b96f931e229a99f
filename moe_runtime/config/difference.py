"""In which keys two configs differ, in one line: of processes that should have been given the same one."""

import json
from typing import Any

_SHOWN = 5


def say_differences(theirs: Any, ours: Any) -> str:
    """The first keys that differ, and how many more there are; empty for equal configs."""
    found = differences(theirs, ours)
    more = f" and {len(found) - _SHOWN} more keys" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """`key: expected THEIRS, got OURS` for every value that differs."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        keys = [*theirs, *(key for key in ours if key not in theirs)]
        each = (differences(theirs.get(key), ours.get(key), f"{path}.{key}" if path else key) for key in keys)
        return [line for lines in each for line in lines]
    return [] if theirs == ours else [f"{path}: expected {json.dumps(theirs)}, got {json.dumps(ours)}"]
