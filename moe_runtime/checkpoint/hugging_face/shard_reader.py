"""Tensors of many safetensors files by name, with one file open at a time.

A file is mapped, so what is read of it counts as memory until it is closed: one shard at most. Only headers
are read before the first tensor; whatever does not fit is found there, before hours of copying.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_runtime.checkpoint.header import read_header
from moe_runtime.checkpoint.hugging_face.json_file import read_object
from moe_runtime.checkpoint.manifest import PICKLE_SUFFIXES
from moe_runtime.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, and what its file says of it."""

    file: str
    shape: tuple[int, ...]
    dtype: str


class ShardReader:
    """Reads tensors in any order; use it as a context, which closes the last file.

    Args:
        folder: of the files.
        index: tensor name -> file name.

    Raises:
        CheckpointError: a file is missing, damaged, or does not hold what the index says.
    """

    def __init__(self, folder: Path, index: Mapping[str, str]) -> None:
        self._folder, self._name = folder, ""
        self._open: Any = None
        self.stored: dict[str, Stored] = {}
        for file in dict.fromkeys(index.values()):
            self._describe(file, index)
        absent = [name for name in index if name not in self.stored]
        if absent:
            raise CheckpointError(
                f"{folder / index[absent[0]]}: expected tensor {absent[0]}{_more(absent)} as the index says, "
                "got none of that name"
            )

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, name: str) -> Tensor:
        """One tensor; it lies in the mapped file, so drop it before the next file is read.

        Raises:
            CheckpointError: the file cannot be read.
        """
        file = self.stored[name].file
        try:
            tensor: Tensor = self._file(file).get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder / file}: {name}: cannot be read: {error}") from None
        return tensor

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
        self._open, self._name = None, ""

    def _file(self, name: str) -> Any:
        if name != self._name:
            self.close()
            self._open, self._name = safe_open(self._folder / name, framework="pt"), name
        return self._open

    def _describe(self, file: str, index: Mapping[str, str]) -> None:
        try:
            _check_header(self._folder / file)
            opened = self._file(file)
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if index.get(name) != file:
                    said = f"in {index[name]}" if name in index else "nowhere"
                    raise CheckpointError(
                        f"{self._folder / file}: expected no tensor {name}: the index has it {said}"
                    )
                view = opened.get_slice(name)
                self.stored[name] = Stored(file, tuple(view.get_shape()), view.get_dtype())
        except FileNotFoundError:
            raise CheckpointError(f"{self._folder / file}: expected a shard, got no such file") from None
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder / file}: cannot be read: {error}") from None


def open_shards(folder: Path) -> ShardReader:
    """The tensors of a Hugging Face model: by its index, or of its single file.

    Raises:
        CheckpointError: neither is there, or the files do not fit the index.
    """
    path = folder / INDEX_FILE
    if path.exists():
        return ShardReader(folder, _read_index(path))
    single = folder / SINGLE_FILE
    if not single.exists():
        pickles = sorted(file.name for file in folder.iterdir() if file.name.endswith(PICKLE_SUFFIXES))
        found = (
            f"{pickles[0]}, which can run code when it is loaded and is not read" if pickles else "neither"
        )
        raise CheckpointError(f"{folder}: expected {SINGLE_FILE} or {INDEX_FILE}, got {found}")
    return ShardReader(folder, index_of(folder, [SINGLE_FILE]))


def index_of(folder: Path, files: Iterable[str]) -> dict[str, str]:
    """Tensor name -> file name, from the headers of files.

    Raises:
        CheckpointError: a file cannot be read.
    """
    index: dict[str, str] = {}
    for file in files:
        try:
            _check_header(folder / file)
            with safe_open(folder / file, framework="pt") as opened:
                index |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / file}: cannot be read: {error}") from None
    return index


def _read_index(path: Path) -> dict[str, str]:
    index = read_object(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(
            f"{path}: weight_map: expected names of tensors and their files, got {index!r:.80}"
        )
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: weight_map.{name}: expected a .safetensors file of this folder, got {file!r:.80}"
            )
    return index


def _check_header(path: Path) -> None:
    """Refuse a header that names a tensor twice, which the library would not notice.

    Raises:
        OSError: it cannot be read.
        CheckpointError: it does, or is no header at all.
    """
    try:
        read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path.parent}{os.sep}{error}") from None


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
