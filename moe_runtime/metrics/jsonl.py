"""A file of JSON lines that outlives its process: the source of truth of a run.

Every line goes to the kernel in one write as soon as it exists, so a killed process loses nothing that
it had finished. A write that fails (full disk) is undone and tried again with the next line: training
goes on, and the file is complete once there is room. W&B's own file is flushed by blocks of 32 KiB and
loses the last steps of a killed run, which is why it is a copy and this is the original.

Lines are appended wherever the file ends: launchers add to the events of a run as well.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16
_RECORD = re.compile(rb'\{"step": (\d+), ')


class JsonLines:
    """An append-only file of JSON objects.

    Args:
        path: made if missing; a torn last line, left by a power cut, is removed first.
        keep_to_step: on resume, lines with a larger `step` are removed first, so that no step occurs
            twice; None keeps all.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, keep_to_step: int | None = None) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o644)
        self._waiting = b""
        self.keep_to(keep_to_step)

    def keep_to(self, step: int | None) -> None:
        """Remove a torn last line and lines with a larger `step`, those that wait for room too.

        Raises:
            OSError: the file cannot be read or cut.
        """
        waiting = [line for line in self._waiting.splitlines(keepends=True) if not _is_past(line, step)]
        self._waiting = b"".join(waiting)
        good = _good_bytes(self.path, step)
        if good < os.fstat(self._file).st_size:
            os.ftruncate(self._file, good)  # lines are in order of step: one cut, whole or not at all
            os.fsync(self._file)

    def append(self, fields: dict[str, Any]) -> str | None:
        """Write one line; the reason if it has to wait for room, None if it is written."""
        self._waiting += json.dumps(fields, allow_nan=False).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            return f"{self.path}: {error.strerror}"
        return None

    def close(self) -> None:
        """Force everything to disk as far as it has room."""
        try:
            self._write()
            os.fsync(self._file)
        except OSError:
            self._waiting = b""  # said already when the line was appended
        os.close(self._file)

    def _write(self) -> None:
        end, rest = os.fstat(self._file).st_size, self._waiting
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            os.ftruncate(self._file, end)
            raise
        self._waiting = b""


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file; a torn last line is left out, a missing file has none."""
    if path.exists():
        for line, fields in _lines(path):
            if fields is not None and line.endswith(b"\n"):
                yield fields


def last_of(path: Path) -> dict[str, Any] | None:
    """The last whole object of a file, without reading what is before it; None if there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        size = _TAIL_BYTES
        while True:
            file.seek(max(0, end - size))
            lines = file.read(size).splitlines(keepends=True)
            for line in reversed(lines[end > size :]):  # the first line of a part may be the rest of one
                fields = _parsed(line)
                if fields is not None and line.endswith(b"\n"):
                    return fields
            if end <= size:
                return None
            size *= 4


def _is_past(line: bytes, step: int | None) -> bool:
    return step is not None and json.loads(line).get("step", 0) > step


def _good_bytes(path: Path, keep_to_step: int | None) -> int:
    """Bytes before the first line that is torn, no JSON object, or past the step."""
    end = 0
    with path.open("rb") as file:
        for line in file:
            step = _step_of(line)
            if step is None or (keep_to_step is not None and step > keep_to_step):
                break
            end += len(line)
    return end


def _step_of(line: bytes) -> int | None:
    """The step of a whole line, 0 where it has none; None of a line that is torn or no object.

    Records begin with their step. Those that do, and end as an object does, are not parsed: a restart should
    not have to read gigabytes of layers digit by digit.
    """
    begins = _RECORD.match(line)
    if begins and line.endswith(b"}\n"):
        return int(begins.group(1))
    fields = _parsed(line) if line.endswith(b"\n") else None
    return None if fields is None else fields.get("step", 0)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    with path.open("rb") as file:
        for line in file:
            yield line, _parsed(line)


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
