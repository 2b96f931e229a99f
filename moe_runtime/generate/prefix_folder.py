"""The folder that holds blocks on disk, shared by any number of processes without locks.

    CACHE_DIR/prefix-1/KEY.safetensors       a block; its time of modification is that of its last use
    CACHE_DIR/prefix-1/.tmp-PID-RANDOM       being written; left over if its writer was killed

A file appears under its name by a rename, so it is there whole or not at all, and a file that another
process removes stays readable for whoever has opened it. Nothing is forced to disk: after a power cut a
block may hold anything, which its seal shows. Files of other names are not ours and never touched.

Latents reveal the text they were made of, so the folder is its owner's alone (0700, files 0600). All names
are looked up in the open folder and no link is followed: whoever can write next to it cannot lead us away.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from weakref import finalize

from moe_runtime.generate.prefix_blocks import Block

FOLDER = "prefix-1"  # with the version of the file format
_BLOCK_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_TMP_NAME = re.compile(r"\.tmp-\d+-[0-9a-f]+")
# Not blocking, for a pipe of that name would wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class FileUse:
    """A file of ours.

    Args:
        used_ns: time of its last use, nanoseconds since 1970.
        is_block: False: a file being written, or left over.
    """

    name: str
    num_bytes: int
    used_ns: int
    is_block: bool


def name_of(block: Block) -> str:
    """File name of a block: its key in hexadecimal digits."""
    return f"{block.key.hex()}.safetensors"


class PrefixFolder:
    """An open folder of blocks.

    Args:
        cache_dir: may be missing, and is then made for its owner alone; may hold other things.
        create: False: it must be there.

    Raises:
        OSError: it cannot be made or opened, or belongs to another user.
    """

    def __init__(self, cache_dir: Path, create: bool = True) -> None:
        self.path = cache_dir / FOLDER
        if create:
            cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.mkdir(mode=0o700, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        if status.st_uid != os.geteuid():
            raise PermissionError(None, "belongs to another user", str(self.path))
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(self._fd, 0o700)

    def read(self, name: str, num_bytes: int) -> bytearray | None:
        """Content of a file; None if there is none, empty if it is no file of that size.

        Raises:
            OSError: the disk fails.
        """
        try:
            descriptor = os.open(name, _READ, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        # Read, not mapped: all of it is hashed at once, and a mapped file that is cut short kills its reader.
        with open(descriptor, "rb", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size != num_bytes:
                return bytearray()
            data = bytearray(num_bytes)
            got = 0
            while got < num_bytes and (count := file.readinto(memoryview(data)[got:])):
                got += count
            return data if got == num_bytes else bytearray()

    def write(self, name: str, data: bytearray, used_ns: int) -> bool:
        """Put a file in place, whole or not at all; False if another process removed it meanwhile.

        Raises:
            OSError: the disk is full or refuses.
        """
        tmp = f".tmp-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with open(os.open(tmp, _CREATE, 0o600, dir_fd=self._fd), "wb", buffering=0) as file:
                written = 0
                while written < len(data):
                    written += file.write(memoryview(data)[written:])
                os.utime(file.fileno(), ns=(used_ns, used_ns))
        except OSError:
            self.remove(tmp)
            raise
        try:
            os.rename(tmp, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except FileNotFoundError:
            return False
        except OSError:
            self.remove(tmp)
            raise
        return True

    def has(self, name: str) -> bool:
        """True if there is something of that name."""
        try:
            os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return True

    def touch(self, name: str, used_ns: int) -> None:
        """Set the time of a file's last use, if there is such a file and the folder may be written."""
        with suppress(OSError):
            os.utime(name, ns=(used_ns, used_ns), dir_fd=self._fd, follow_symlinks=False)

    def remove(self, name: str) -> bool:
        """Remove a file; False if that could not be done."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except OSError:
            return False
        return True

    def files(self) -> Iterator[FileUse]:
        """Files of ours, in no order; one that goes meanwhile is left out.

        Raises:
            OSError: the folder cannot be read.
        """
        with os.scandir(self._fd) as found:
            for entry in found:
                is_block = _BLOCK_NAME.fullmatch(entry.name) is not None
                if not is_block and _TMP_NAME.fullmatch(entry.name) is None:
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield FileUse(entry.name, status.st_size, status.st_mtime_ns, is_block)
