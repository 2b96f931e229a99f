"""Files and folders written to survive a power cut: write, fsync, hash, rename, fsync the parent."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moe_runtime.checkpoint.folder import OLD_PREFIX, sha256_of
from moe_runtime.checkpoint.manifest import FileEntry, Kind
from moe_runtime.checkpoint.tensors import describe_tensors


def write_tensors(path: Path, kind: Kind, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Write a safetensors file and force it to disk.

    Raises:
        OSError, SafetensorError: the disk is full or refuses.
    """
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(ready, path)
    return _sync_and_hash(path, kind, describe_tensors(ready))


def write_bytes(path: Path, data: bytes) -> FileEntry:
    """Write bytes and force them to disk.

    Raises:
        OSError: the disk is full or refuses.
    """
    path.write_bytes(data)
    return _sync_and_hash(path, "extra", {})


def _sync_and_hash(path: Path, kind: Kind, tensors: Any) -> FileEntry:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return FileEntry(kind=kind, bytes=path.stat().st_size, sha256=sha256_of(path), tensors=tensors)


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
