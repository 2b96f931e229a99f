"""safetensors files written one tensor at a time.

The format puts a JSON header with every name, dtype, shape and place before the data, so a writer that
knows them beforehand never holds more than the tensor it is writing; `safetensors.save_file` wants all
tensors of a file at once and copies each. What is to be written is planned first, as data; tensors must
then come in the planned order.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from moe_runtime.checkpoint.manifest import ITEM_BYTES
from moe_runtime.checkpoint.tensors import DTYPE_WORDS

_ITEM_BYTES = ITEM_BYTES | {"F8_E8M0": 1}
_WORDS = DTYPE_WORDS | {torch.float8_e8m0fnu: "F8_E8M0"}
_ALIGN = 8
_PIECE_BYTES = 1 << 20


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


def header_of(planned: Sequence[Planned], about: Mapping[str, str]) -> bytes:
    """What stands before the data: the length of the JSON that follows, and the JSON, padded.

    Args:
        planned: the tensors, in the order of their data.
        about: words that the file says of itself.
    """
    fields: dict[str, object] = {"__metadata__": {"format": "pt", **about}}
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
    text += b" " * (-len(text) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


class ShardWriter:
    """One file, as a context: the header at once, then `write` for each tensor, in order.

    Args:
        path: of the file.
        planned: its tensors.
        about: words that the file says of itself.
    """

    def __init__(
        self, path: Path, planned: Sequence[Planned], about: Mapping[str, str] | None = None
    ) -> None:
        self._path, self._planned, self._next = path, planned, 0
        self._header = header_of(planned, about or {})
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self._file: BinaryIO = path.open("wb")

    def __enter__(self) -> "ShardWriter":
        self._put(self._header)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert self._next == len(self._planned), (
                    f"{self._path}: {self._planned[self._next]} is not written"
                )
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
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
        for start in range(0, len(data), _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            self._digest.update(piece)
            self._file.write(piece)  # from the processor's cache, where hashing has left it
        self.num_bytes += len(data)
