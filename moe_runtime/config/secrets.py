"""Secrets have no place in a run: not in its config, not in what it writes.

A run folder is copied, shared and uploaded; its config, records and messages go with it. So keys and
passwords come by the environment alone (`WANDB_API_KEY`, `HF_TOKEN`). A config that holds one is refused,
without repeating it, and whatever text is written has the values of such variables taken out, for the
messages of libraries may quote them.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

_KEYS = re.compile(
    r"api_?key|access_?key|private_?key|secret|passw(or)?d|passphrase|credential|(^|_)(auth|access)_?token|_token$|^token$",
    re.IGNORECASE,
)
_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[0-9A-Z]{16}"
    r"|^[0-9a-f]{40}$|[a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@"
)
_VARIABLES = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters of a value that can be told from ordinary text


def find_secrets(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of keys that are named like a secret, or whose text looks like one."""
    for key, value in values.items():
        here = (*path, str(key))
        if isinstance(value, Mapping):
            yield from find_secrets(value, here)
        elif _KEYS.search(str(key)) or any(_VALUES.search(text) for text in _texts(value)):
            yield here


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def redact(text: str) -> str:
    """The text without the values of variables of the environment that are named like secrets."""
    for name, value in os.environ.items():
        if _VARIABLES.search(name) and len(value) >= _SHORTEST and value in text:
            text = text.replace(value, f"[{name}]")
    return text
