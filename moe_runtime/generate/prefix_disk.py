"""Blocks on disk, kept from one process to the next; the least recently used first out.

Eviction needs no lock either. Whoever stores first removes old files until its own will fit, and looks again
when it has written. Two writers at once may so exceed the bound for a moment, by what the other has just
written; the one that looks last sees all files and brings the folder back within it.

A cache must never stop what it is to speed up: if the disk is full or refuses, there is one warning, and
from then on nothing is stored.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from moe_runtime.generate.prefix_blocks import Block
from moe_runtime.generate.prefix_file import BlockFile
from moe_runtime.generate.prefix_fingerprint import LatentForm
from moe_runtime.generate.prefix_folder import PrefixFolder, name_of
from moe_runtime.generate.prefix_tier import TierStatistics

_log = logging.getLogger(__name__)
_LEFT_OVER_NS = 600 * 10**9  # no block takes that long to write


class DiskTier:
    """Reads and writes the blocks of one model in a folder that others may use too.

    Args:
        form: of the latents.
        cache_dir: made if it is missing.
        max_bytes: bound of all files of the folder, other models' included.

    Raises:
        OSError: the folder cannot be made or opened.
    """

    def __init__(self, form: LatentForm, cache_dir: Path, max_bytes: int) -> None:
        self.name = "disk"
        self.statistics = TierStatistics()
        self._file = BlockFile(form)
        self._folder = PrefixFolder(cache_dir)
        self._max_bytes = max_bytes
        self._max_blocks = max_bytes // self._file.num_bytes
        self._may_write = True

    def read(self, block: Block) -> Tensor | None:
        """As `Tier.read`; a file that is not what its name says is removed."""
        name = name_of(block)
        try:
            data = self._folder.read(name, self._file.num_bytes)
        except OSError as error:
            _log.debug("prefix cache: %s cannot be read: %s", name, error.strerror)
            return None
        if data is None:
            return None
        latents = self._file.unpack(block, data)
        if latents is None:
            self._folder.remove(name)
            self.statistics.damaged += 1
        else:
            self.statistics.hits += 1
        return latents

    def lacks(self, path: Sequence[Block]) -> list[Block]:
        """As `Tier.lacks`."""
        if not self._may_write:
            return []
        return [block for block in path[: self._max_blocks] if not self._folder.has(name_of(block))]

    def keep(self, path: Sequence[Block], latents: Mapping[bytes, Tensor]) -> None:
        """As `Tier.keep`."""
        began_ns = self._touch(path)
        new = {block.key for block in self.lacks(path)} & latents.keys()
        if not new:
            return
        try:
            self._make_room(len(new) * self._file.num_bytes)
            for depth, block in enumerate(path):
                if block.key in new:
                    data = self._file.pack(block, latents[block.key])
                    self.statistics.stored += self._folder.write(name_of(block), data, began_ns - depth)
            self._make_room(0)
        except OSError as error:
            self._may_write = False
            text = "prefix cache: %s cannot be written (%s); going on without storing"
            _log.warning(text, self._folder.path, error.strerror)

    def note_use(self, path: Sequence[Block]) -> None:
        """As `Tier.note_use`."""
        self._touch(path)

    def _touch(self, path: Sequence[Block]) -> int:
        """Date files by now, each a nanosecond before its parent, and tell what now was."""
        now_ns = time.time_ns()
        for depth, block in enumerate(path):
            self._folder.touch(name_of(block), now_ns - depth)
        return now_ns

    def _make_room(self, num_bytes: int) -> None:
        """Remove the files that were used least recently until so many more bytes fit."""
        oldest_ns = time.time_ns() - _LEFT_OVER_NS
        files = list(self._folder.files())
        total = sum(file.num_bytes for file in files)
        for file in sorted(files, key=lambda file: file.used_ns):
            left_over = not file.is_block and file.used_ns < oldest_ns
            if total + num_bytes <= self._max_bytes and not left_over:
                continue
            total -= file.num_bytes
            if self._folder.remove(file.name) and file.is_block:
                self.statistics.evicted += 1
