"""Where a rank is, in a small file that others read: the file outlives the rank.

The file is mapped into memory, so a mark costs some microseconds and no system call, and what a rank did last
stands there also after it was killed. Its writers touch different bytes: the rank's own thread writes its
mark, threads beside it the time of a beat and the point that a checkpoint is at. A reader takes a mark only
if the count before and the count behind it agree.

Rejected: a line appended at every beat. The last mark before a death would be up to a beat old, and a full
disk would look like a dead rank.
"""

import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.parallel.progress import Progress

_BEAT = struct.Struct("<d")  # the newest beat, `time.monotonic()`, which all processes of a machine share
# version, pid, ident of the rank's thread, native ids of it and of the thread that beats
_HEAD = struct.Struct("<8sqQqq")
_MARK = struct.Struct("<Qdq?16s64s160sQ")  # count, time, step, is_first_step, phase, entry, part, count
_WRITES = struct.Struct("<16s")  # the point that a checkpoint behind the training is at
_WRITES_AT, _HEAD_AT, _MARK_AT = 16, 64, 128
_VERSION = b"beat 1  "
_SIZE = 512
_TRIES = 20  # a mark is written in about a microsecond; a reader that meets twenty of them reads no file


@dataclass(frozen=True)
class Beat:
    """What one heartbeat file says.

    Args:
        pid: process of the rank.
        thread: `threading.get_ident()` of the rank's own thread.
        native_ids: of the rank's own thread and of the one that beats, as the kernel counts threads.
        beaten_s: `time.monotonic()` of the newest beat.
        marked_s: of the newest mark.
        writes: the point that a checkpoint is at (`write`, `rename`), or empty.
        count, step, is_first_step, phase, entry, part: as in `Progress`.
    """

    pid: int
    thread: int
    native_ids: tuple[int, int]
    beaten_s: float
    marked_s: float
    writes: str
    count: int
    step: int
    is_first_step: bool
    phase: str
    entry: str
    part: str

    @property
    def action(self) -> str:
        """The entry and its part, such as `3F5, dispatch layers.3`; empty outside of a program."""
        return ", ".join(filter(None, (self.entry, self.part)))


class BeatFile:
    """The writing end.

    Args:
        path: made, or taken over from the rank before a restart.
    """

    def __init__(self, path: Path) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(file, 0, _SIZE)  # a page that has no room later would kill the rank
            self._bytes = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)

    def opens(self, pid: int, thread: int, native_ids: tuple[int, int]) -> None:
        """Say whose file it is; the last thing to be written before it counts."""
        self._bytes[_HEAD_AT : _HEAD_AT + _HEAD.size] = _HEAD.pack(_VERSION, pid, thread, *native_ids)

    def beats(self, now_s: float) -> None:
        """A beat, at `time.monotonic()`."""
        self._bytes[: _BEAT.size] = _BEAT.pack(now_s)

    def writes(self, point: str) -> None:
        """A checkpoint that is written behind the training comes to a point; empty: it is done."""
        self._bytes[_WRITES_AT : _WRITES_AT + _WRITES.size] = _WRITES.pack(point.encode())

    def marks(self, progress: Progress, now_s: float) -> None:
        """A mark, at `time.monotonic()`."""
        self._bytes[_MARK_AT : _MARK_AT + _MARK.size] = _MARK.pack(
            progress.count,
            now_s,
            progress.step,
            progress.is_first_step,
            progress.phase.encode(),
            progress.entry.encode(),
            progress.part.encode(),
            progress.count,
        )

    def closes(self) -> None:
        """Give the mapping back; the file stays."""
        self._bytes.close()


def read_beat(path: Path) -> Beat | None:
    """What a rank last said; None if it has not begun to."""
    for _ in range(_TRIES):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if len(data) != _SIZE:
            return None
        version, pid, thread, *native_ids = _HEAD.unpack_from(data, _HEAD_AT)
        if version != _VERSION:
            return None
        count, marked_s, step, is_first, phase, entry, part, again = _MARK.unpack_from(data, _MARK_AT)
        if count == again:
            (beaten_s,), (writes,) = _BEAT.unpack_from(data), _WRITES.unpack_from(data, _WRITES_AT)
            times, place = (beaten_s, marked_s), (_text(phase), _text(entry), _text(part))
            ids = (native_ids[0], native_ids[1])
            return Beat(pid, thread, ids, *times, _text(writes), count, step, is_first, *place)
    return None


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode(errors="replace")
