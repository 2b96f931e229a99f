"""Parts of tensors out of many files, each mapped once; nothing else of them is read.

A file of optimizer state holds whole partitions, and a rank of another layout needs some elements of some of
them. Files are mapped, so a slice costs its own pages, however large the tensor is.
"""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_runtime.checkpoint.folder import Checkpoint
from moe_runtime.checkpoint.manifest import TensorEntry
from moe_runtime.errors import CheckpointError


class SliceReader:
    """Reads rows of the tensors of one checkpoint; use it in a `with` block.

    Args:
        checkpoint: a verified checkpoint.

    Attributes:
        bytes_read: of all slices so far.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.bytes_read = 0
        self._files: dict[str, Any] = {}
        self._views: dict[tuple[str, str], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._views.clear()
        for file in self._files.values():
            file.__exit__(kind, error, trace)
        self._files.clear()

    def entry(self, file: str, name: str) -> TensorEntry:
        """What the manifest says of a tensor.

        Raises:
            CheckpointError: it lists none of that name there.
        """
        listed = self.checkpoint.manifest.files[file].tensors
        if name not in listed:
            raise CheckpointError(f"{self._path(file)}: expected tensor {name}, got none of that name")
        return listed[name]

    def rows(self, file: str, name: str, start: int, stop: int) -> Tensor:
        """Rows start .. stop - 1 along the first axis, fresh, on the CPU.

        Raises:
            CheckpointError: the file cannot be read or does not hold what the manifest says.
        """
        entry = self.entry(file, name)
        if not entry.shape or not 0 <= start <= stop <= entry.shape[0]:
            raise CheckpointError(
                f"{self._path(file)}: {name}: expected rows {start} to {stop}, got shape {list(entry.shape)}"
            )
        return self._read(file, name, slice(start, stop))

    def whole(self, file: str, name: str) -> Tensor:
        """A whole tensor, of any shape.

        Raises:
            CheckpointError: the file cannot be read or does not hold what the manifest says.
        """
        self.entry(file, name)
        return self._read(file, name, ...)

    def _read(self, file: str, name: str, part: Any) -> Tensor:
        try:
            view = self._view(file, name)
            tensor: Tensor = self._files[file].get_tensor(name) if part is ... else view[part]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._path(file)}: cannot be read: {error}") from None
        self.bytes_read += tensor.nbytes
        return tensor

    def _view(self, file: str, name: str) -> Any:
        """A tensor that is not read yet; its shape and dtype are those of the manifest."""
        if file not in self._files:
            self._files[file] = safe_open(self._path(file), framework="pt").__enter__()
        if (file, name) not in self._views:
            view, entry = self._files[file].get_slice(name), self.entry(file, name)
            got = (tuple(view.get_shape()), view.get_dtype())
            if got != (entry.shape, entry.dtype):
                raise CheckpointError(
                    f"{self._path(file)}: {name}: expected {entry.dtype} {list(entry.shape)}, "
                    f"got {got[1]} {list(got[0])}"
                )
            self._views[file, name] = view
        return self._views[file, name]

    def _path(self, file: str) -> Path:
        return self.checkpoint.path / file
