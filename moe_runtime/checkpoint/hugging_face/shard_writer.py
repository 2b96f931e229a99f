"""A plan of many tensors split into files of a bounded size, and written in order."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType

from torch import Tensor

from moe_runtime.checkpoint.tensor_file import Planned, ShardWriter
from moe_runtime.errors import CheckpointError


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
