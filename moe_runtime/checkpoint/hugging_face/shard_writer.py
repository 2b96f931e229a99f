"""safetensors files written one tensor at a time.

The format puts a JSON header with every name, dtype, shape and place before the data, so a writer that
knows them beforehand never holds more than the tensor it is writing; `safetensors.save_file` wants all
tensors of a file at once. What is to be written is planned first, as data, and split into files of a bounded
size; tensors must then come in the planned order.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from moe_runtime.checkpoint.manifest import ITEM_BYTES
from moe_runtime.checkpoint.tensors import DTYPE_WORDS
from moe_runtime.errors import CheckpointError

_ITEM_BYTES = ITEM_BYTES | {"F8_E8M0": 1}
_WORDS = DTYPE_WORDS | {torch.float8_e8m0fnu: "F8_E8M0"}
_ALIGN = 8


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: name, safetensors' dtype word, shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor with elements, not copied if it is contiguous."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.data


def split_in_files(planned: Iterable[Planned], max_bytes: int) -> list[list[Planned]]:
    """The tensors in order, in files of at most `max_bytes`; a larger tensor has a file of its own."""
    files: list[list[Planned]] = []
    room = 0
    for tensor in planned:
        if not files or tensor.num_bytes > room:
            files.append([])
            room = max_bytes
        files[-1].append(tensor)
        room -= tensor.num_bytes
    return files


class ShardWriter:
    """One file, as a context: the header at once, then `write` for each tensor, in order.

    Args:
        path: of the file.
        planned: its tensors.
    """

    def __init__(self, path: Path, planned: Sequence[Planned]) -> None:
        self._path, self._planned, self._next = path, planned, 0
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> "ShardWriter":
        header = _header(self._planned)
        self._put(len(header).to_bytes(8, "little"))
        self._put(header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            assert self._next == len(self._planned), (
                f"{self._path}: {self._planned[self._next]} is not written"
            )
            self._file.flush()
            os.fsync(self._file.fileno())
        self._file.close()

    @property
    def sha256(self) -> str:
        """Of everything written so far."""
        return self._digest.hexdigest()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, on the CPU, with the planned name, dtype and shape."""
        wanted = self._planned[self._next]
        got = Planned(name, _WORDS[tensor.dtype], tuple(tensor.shape))
        assert got == wanted, f"{self._path}: expected {wanted}, got {got}"
        self._next += 1
        if tensor.numel():
            self._put(bytes_of(tensor))

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.num_bytes += len(data)


class FilesWriter:
    """Several files, one after the other, as a context; opens the next one as tensors come.

    Args:
        folder: where they go.
        files: (file name, its tensors), in the order in which they are written.

    After the context, `written` holds (file name, bytes, sha256) of each.

    Raises:
        CheckpointError: the disk is full or refuses.
    """

    def __init__(self, folder: Path, files: Sequence[tuple[str, Sequence[Planned]]]) -> None:
        self._folder, self._files = folder, list(files)
        self._current: ShardWriter | None = None
        self._left = 0
        self.written: list[tuple[str, int, str]] = []

    def __enter__(self) -> "FilesWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._current is not None:
            self._current.__exit__(kind, error, trace)
        assert kind is not None or len(self.written) == len(self._files), "a file is not written"

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the plan.

        Raises:
            CheckpointError: the disk is full or refuses.
        """
        file, planned = self._files[len(self.written)]
        try:
            if self._current is None:
                self._current, self._left = (
                    ShardWriter(self._folder / file, planned).__enter__(),
                    len(planned),
                )
            self._current.write(name, tensor)
            self._left -= 1
            if self._left == 0:
                writer, self._current = self._current, None
                writer.__exit__(None, None, None)
                self.written.append((file, writer.num_bytes, writer.sha256))
        except OSError as error:
            raise CheckpointError(f"{self._folder / file}: cannot be written: {error.strerror}") from error


def _header(planned: Sequence[Planned]) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in planned:
        end = start + tensor.num_bytes
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGN)
