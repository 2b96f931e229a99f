"""Files and folders written to survive a power cut: write, hash, fsync, read back, rename, fsync the parent.

The hash is of what memory holds, not of what the file says afterwards: a hash taken from the file would
bless a byte that the disk, its cable or the file system changed on the way. After fsync the cached pages
are dropped and the file is read from the disk again and compared, so that a checkpoint counts as written
only when it can be read. A file system without a disk (tmpfs) keeps its pages; there the comparison proves
the copy in memory alone. A disk that answers from its own cache cannot be told from one that read.
"""

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from moe_runtime.checkpoint.folder import OLD_PREFIX
from moe_runtime.checkpoint.manifest import FileEntry, Kind
from moe_runtime.checkpoint.tensor_file import Planned, ShardWriter, bytes_of, header_of
from moe_runtime.checkpoint.tensors import describe_tensors
from moe_runtime.errors import CheckpointError

_READ_BYTES = 4 << 20


def write_tensors(
    path: Path,
    kind: Kind,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, str],
    midway: Callable[[], object] = lambda: None,
) -> FileEntry:
    """Write a safetensors file, force it to disk and read it back.

    Args:
        path: of the file.
        kind: what the manifest calls it.
        tensors: by name; on the CPU.
        about: words that the file says of itself, by which one in another's place is known.
        midway: called when the first tensor has been written.

    Raises:
        OSError: the disk is full or refuses.
        CheckpointError: a dtype that checkpoints do not hold, or the disk gave back other bytes.
    """
    described = describe_tensors(tensors)
    planned = [Planned(name, entry.dtype, entry.shape) for name, entry in described.items()]
    with ShardWriter(path, planned, about) as writer:
        for number, (name, tensor) in enumerate(tensors.items()):
            writer.write(name, tensor)
            if number == 0:
                midway()
    full = (tensor for tensor in tensors.values() if tensor.numel())
    check_on_disk(path, [header_of(planned, about), *map(bytes_of, full)])
    return FileEntry(kind=kind, bytes=writer.num_bytes, sha256=writer.sha256, tensors=described)


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write bytes, force them to disk and read them back.

    Raises:
        OSError: the disk is full or refuses.
        CheckpointError: the disk gave back other bytes.
    """
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    check_on_disk(path, [data])
    return FileEntry(kind="extra", bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def check_on_disk(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Read a file past the page cache and compare it with what was to be written.

    Args:
        path: of a file that is on disk (fsync).
        pieces: its bytes, in order.

    Raises:
        OSError: it cannot be read.
        CheckpointError: says at which byte it differs.
    """
    buffer = np.empty(_READ_BYTES, dtype=np.uint8)
    place = 0
    with path.open("rb", buffering=0) as file:
        _drop_pages(file)
        for piece in pieces:
            wanted = np.frombuffer(piece, dtype=np.uint8)
            for start in range(0, wanted.size, _READ_BYTES):
                part = wanted[start : start + _READ_BYTES]
                got = _read_into(file, buffer[: part.size])
                if not np.array_equal(buffer[:got], part):
                    raise CheckpointError(
                        f"{path.name}: the disk gave back other bytes than were written, from byte {place} on"
                    )
                place += got
        if file.read(1):
            raise CheckpointError(f"{path.name}: expected {place} bytes on disk, got more")
        # Nothing reads it soon. Its pages serve the next checkpoint: new ones would cost more than the copy.
        _drop_pages(file)


def _drop_pages(file: io.FileIO) -> None:
    """Have the system forget its copy of a file that is on disk, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_into(file: io.FileIO, buffer: np.ndarray) -> int:
    """Fill a buffer, which one call of the system need not do; gives the bytes read."""
    place = 0
    while place < buffer.size and (got := file.readinto(buffer[place:].data)):
        place += got
    return place


def make_empty(folder: Path) -> None:
    """Make a folder that holds nothing, whatever was there."""
    remove(folder)
    folder.mkdir(parents=True)


def replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`, which may exist, and force the renames to disk.

    A folder cannot be renamed over another that holds files, so the old one steps aside first; a kill
    in between is undone by `retain.remove_leftovers`.
    """
    old = target.with_name(OLD_PREFIX + target.name)
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    fsync_folder(target.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing happens if it is not there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def fsync_folder(folder: Path) -> None:
    """Force the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Free bytes of the file system that holds `folder` or will hold it."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
