"""Options of commands that use the prefix cache, and sizes as people write them."""

import re
from pathlib import Path
from typing import Annotated

import typer

from moe_runtime.errors import ConfigError

CacheDir = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="keep latents of prompts in this folder, for later runs too"),
]
CacheSize = Annotated[
    str,
    typer.Option("--cache-size", help="bound of that folder and of the cache in memory: bytes, or 500MB"),
]
DEFAULT_CACHE_SIZE = "1GB"

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def bytes_of(size: str, option: str = "--cache-size") -> int:
    """`1048576`, `500MB` (10^6) or `1.5GiB` (2^30) in bytes.

    Raises:
        ConfigError: it is no size.
    """
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ConfigError(f"{option}: expected bytes, such as 1048576, 500MB or 2GiB, got {size!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.upper()])
