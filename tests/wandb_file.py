"""Reads the file that W&B writes offline, as its own `wandb sync` does, by our own hand.

The file is a log of LevelDB's form: `:W&B`, two bytes of magic and one of version, then blocks of 32 KiB.
A block has chunks {CRC-32 of type and data, length, type, data}; types 1 to 4 are a whole record, and the
first, middle and last part of one. Records are protocol buffers of W&B.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK, _HEAD = 32 * 1024, struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


@dataclass
class WandbFile:
    """What a file holds.

    Args:
        config: values by section.
        history: of each row, values by key; media as dictionaries.
        alerts: title and text of each.
        fields: names of the records that occur, and how many there are of each.
    """

    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[tuple[str, str]] = field(default_factory=list)
    fields: dict[str, int] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """Keys of all rows, W&B's own apart."""
        return {key for row in self.history for key in row if not key.startswith("_")}


def only_file(run_dir: Path) -> Path:
    """The one offline file of a run folder."""
    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    return path


def read_wandb(path: Path) -> WandbFile:
    """Everything up to a torn tail."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = WandbFile()
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        found.fields[kind] = found.fields.get(kind, 0) + 1
        if kind == "run":
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found.history.append(_row(record.history.item))
        elif kind == "alert":
            found.alerts.append((record.alert.title, record.alert.text))
    return found


def _row(items: Any) -> dict[str, Any]:
    """One row; what W&B keeps as parts of a key (`samples.path`) is put together again."""
    row: dict[str, Any] = {}
    for item in items:
        first, *rest = [item.key] if item.key else list(item.nested_key)
        place, name = row, first
        for part in rest:
            place, name = place.setdefault(name, {}), part
        place[name] = json.loads(item.value_json)
    return row


def _records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B", data[:8]
    whole, place = b"", 7
    while place + _HEAD.size <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEAD.size:
            place += left
            continue
        checksum, length, kind = _HEAD.unpack_from(data, place)
        chunk = data[place + _HEAD.size : place + _HEAD.size + length]
        if kind == 0 or len(chunk) < length:  # room reserved, or torn
            return
        assert zlib.crc32(bytes([kind]) + chunk) == checksum, f"damaged at byte {place}"
        place += _HEAD.size + length
        whole = chunk if kind in (_WHOLE, _FIRST) else whole + chunk
        if kind in (_WHOLE, _LAST):
            yield whole
