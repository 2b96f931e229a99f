"""Formats of the manifest: every one ever released is read, and made into the newest while it is read.

    1   step and tokens at the top; a reader had to have the layout that saved
    2   position with sequences and skipped ranges, schedules and rng for people

A reader sees the newest format only. Files of tensors are the same in both. A format from the future is
refused by its number: what it means cannot be known, and guessing would train on nonsense.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from moe_runtime.errors import CheckpointError

FORMAT: Literal[2] = 2
Fields = dict[str, Any]


class NewerFormatError(CheckpointError):
    """A checkpoint that a newer version of this program wrote."""


def to_newest(fields: Fields, where: Path) -> Fields:
    """The fields of a manifest of any released format as those of the newest; nothing is checked yet.

    Args:
        fields: of the JSON object.
        where: its path, for messages.

    Raises:
        CheckpointError: no format.
        NewerFormatError: one that this version does not know.
    """
    found = fields.get("format")
    if type(found) is not int or found < 1:
        raise CheckpointError(f"{where}: expected format 1 to {FORMAT}, got {found!r}")
    if found > FORMAT:
        raise NewerFormatError(
            f"{where}: format {found}: written by a newer version; this one reads formats 1 to {FORMAT}: "
            "update moe_runtime"
        )
    for number in range(found, FORMAT):
        fields = _STEPS_UP[number](fields)
    return fields


def _from_1(fields: Fields) -> Fields:
    """Sequences follow from tokens, for no data was ever skipped."""
    rest = {key: value for key, value in fields.items() if key not in ("step", "tokens")}
    position: Fields = {key: fields[key] for key in ("step", "tokens") if key in fields}
    config = fields.get("config")
    batch = config.get("batch") if isinstance(config, dict) else None
    seq_len = batch.get("seq_len") if isinstance(batch, dict) else None
    tokens = fields.get("tokens")
    if isinstance(seq_len, int) and isinstance(tokens, int) and seq_len > 0:
        position["sequences"] = tokens // seq_len
    return rest | {"format": 2, "position": position}


_STEPS_UP: dict[int, Callable[[Fields], Fields]] = {1: _from_1}
