"""Where documents come from: the standard library, a folder, files of a pattern, or one file.

A source is a list of chunks, each a list of parts of files: the units that are read by several processes,
and that a preparation goes on from when it was killed. Chunks follow from the files alone, never from how
many processes there are. A source gives the same documents in the same order each time.

What is not UTF-8 is read with U+FFFD in its place and counted; files that hold a zero byte are taken for
binary, skipped and counted.
"""

import glob
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from moe_runtime.config.data import TextForm
from moe_runtime.data.documents import PLAIN, Document
from moe_runtime.data.readers import (
    COMPRESSED,
    FOLDER_PIECE_BYTES,
    TXT_PIECE_BYTES,
    FilePart,
    kind_of,
    open_parquet,
    read_part,
)
from moe_runtime.errors import DataError

TEXT_SUFFIXES = (".json", ".md", ".py", ".rst", ".txt")
CHUNK_BYTES = 32 * 1024 * 1024
STDLIB_SKIPPED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"},
)
KINDS = "a .txt, .jsonl or .parquet file"
EXPECTED = f"expected builtin:stdlib, dir:PATH, glob:PATTERN, or {KINDS} (.gz, .zst, .bz2 and .xz too)"

Chunk = tuple[FilePart, ...]


@dataclass(frozen=True)
class Source:
    """Files in order, and how their text is read.

    Args:
        name: as the user spells it.
        files: (path, name, part) of each file.
        piece_bytes: size of documents that text files are cut into.
        licence: what is known about the licence of the text.
        form: which text of an object is read.
    """

    name: str
    files: tuple[tuple[Path, str, str], ...]
    piece_bytes: int
    licence: str | None = None
    form: TextForm = PLAIN

    def chunks(self, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
        """The units of work, each of about `chunk_bytes` of files.

        Raises:
            DataError: a file cannot be read.
        """
        chunks: list[Chunk] = []
        parts: list[FilePart] = []
        size = 0
        for part in self._parts(chunk_bytes):
            parts.append(part)
            size += part.num_bytes
            if size >= chunk_bytes or len(parts) == 4096:
                chunks.append(tuple(parts))
                parts, size = [], 0
        return [*chunks, tuple(parts)] if parts else chunks

    def read(self, counts: Counter[str]) -> Iterator[Document]:
        """All documents in order.

        Raises:
            DataError: a file cannot be read or is not what its name says.
        """
        for chunk in self.chunks():
            yield from read_chunk(chunk, self.form, counts)

    def _parts(self, chunk_bytes: int) -> Iterator[FilePart]:
        for file, name, part in self.files:
            kind, is_compressed = kind_of(file)
            fixed = (str(file), name, part, kind)
            try:
                size = file.stat().st_size
                if kind == "parquet":
                    yield from _row_groups(fixed, chunk_bytes)
                    continue
                borders = [0, size] if is_compressed else _borders(file, size, kind, chunk_bytes)
            except OSError as error:
                raise DataError(f"{file}: {error.strerror}") from error
            for start, end in pairwise(borders):
                yield FilePart(*fixed, start, end, self.piece_bytes, end - start)


def read_chunk(chunk: Chunk, form: TextForm, counts: Counter[str]) -> Iterator[Document]:
    """All documents of a chunk in order; adds to `counts` as `read_part` does.

    Raises:
        DataError: a file cannot be read or is not what its name says.
    """
    done = 0
    for part in chunk:
        yield from read_part(part, form, counts)
        done += part.num_bytes
        counts["read_bytes"] = done


def _borders(file: Path, size: int, kind: str, chunk_bytes: int) -> list[int]:
    """Where a file may be cut: after the line ends that follow multiples of the chunk's size."""
    borders = [0]
    if size > chunk_bytes:
        with file.open("rb") as stream:
            for near in range(chunk_bytes, size, chunk_bytes):
                if near > borders[-1]:
                    stream.seek(near)
                    # Text without line ends is cut all the same, at the start of a character.
                    line = stream.readline() if kind == "jsonl" else stream.readline(FOLDER_PIECE_BYTES)
                    whole = line.endswith(b"\n") or near + len(line) == size
                    end = near + len(line) if whole else near + _first_character(line)
                    if borders[-1] < end < size:
                        borders.append(end)
    return [*borders, size]


def _first_character(raw: bytes) -> int:
    """Place of the first byte that begins a character."""
    return next((place for place, byte in enumerate(raw[:4]) if byte & 0xC0 != 0x80), 0)


def _row_groups(fixed: tuple[str, str, str, str], chunk_bytes: int) -> Iterator[FilePart]:
    """Runs of row groups of about the size of a chunk."""
    with open_parquet(fixed[0]) as table:
        sizes = [table.metadata.row_group(group).total_byte_size for group in range(table.num_row_groups)]
    first, size = 0, 0
    for group, bytes_ in enumerate(sizes):
        size += bytes_
        if size >= chunk_bytes or group == len(sizes) - 1:
            yield FilePart(*fixed, first, group + 1, 0, size)
            first, size = group + 1, 0


def open_source(name: str, form: TextForm = PLAIN) -> Source:
    """The source of a name.

    Args:
        form: which text of an object of JSON or a row of Parquet is read.

    Raises:
        DataError: unknown name, or nothing is there.
    """
    if name == "builtin:stdlib":
        return _stdlib()
    if name.startswith("dir:"):
        return _folder(name, Path(name[4:]).expanduser())
    if name.startswith("glob:"):
        return _pattern(name, os.path.expanduser(name[5:]), form)
    file = Path(name).expanduser()
    if not _is_known(file):
        raise DataError(f"source {name!r}: {EXPECTED}")
    if not file.is_file():
        raise DataError(f"source {name!r}: no such file")
    return Source(name, ((file, file.name, file.name),), TXT_PIECE_BYTES, form=form)


def _is_known(file: Path) -> bool:
    kind, is_compressed = kind_of(file)
    if kind == "text":
        inner = Path(file.stem) if is_compressed else file
        return inner.suffix == ".txt"
    return not (kind == "parquet" and is_compressed)


def _folder(name: str, root: Path) -> Source:
    """Text files below a folder, in the order of their paths; each file is a document.

    Hidden files and folders and links to folders are left out.
    """
    if not root.is_dir():
        raise DataError(f"source {name}: no such folder: {root}")
    files = _text_files(root, TEXT_SUFFIXES, frozenset())
    if not files:
        other = next((f for f in sorted(root.rglob("*")) if f.is_file() and _is_known(f)), None)
        hint = f"; for such files say glob:{root}/**/*{''.join(other.suffixes)}" if other else ""
        raise DataError(f"source {name}: no {', '.join(TEXT_SUFFIXES)} files under {root}{hint}")
    return Source(name, files, FOLDER_PIECE_BYTES)


def _text_files(
    root: Path, suffixes: tuple[str, ...], skipped: frozenset[str]
) -> tuple[tuple[Path, str, str], ...]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in skipped and not name.startswith("."))
        for name in sorted(files):
            if name.endswith(suffixes) and not name.startswith("."):
                file = Path(folder, name)
                inside = file.relative_to(root)
                part = inside.parts[0] if len(inside.parts) > 1 else "."
                found.append((file, inside.as_posix(), part))
    return tuple(found)


def _pattern(name: str, pattern: str, form: TextForm) -> Source:
    """Files of a pattern in the order of their names, each read by its kind."""
    paths = [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]
    files = [file for file in paths if file.is_file()]
    if not files:
        raise DataError(f"source {name}: no file of that pattern")
    strange = next((file for file in files if not _is_known(file)), None)
    if strange is not None:
        raise DataError(f"source {name}: expected only {KINDS}s ({', '.join(COMPRESSED)} too), got {strange}")
    return Source(name, tuple((f, f.name, f.name) for f in files), TXT_PIECE_BYTES, form=form)


def _stdlib() -> Source:
    """Python's own library without its tests: about 12 MB of source text."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DataError(
            f"source builtin:stdlib: no Python sources under {root} (this Python ships compiled files only); "
            "use dir:PATH or a .txt, .jsonl or .parquet file"
        )
    licence = f"PSF-2.0; standard library of {platform.python_implementation()} {platform.python_version()}"
    return Source("builtin:stdlib", _text_files(root, (".py",), STDLIB_SKIPPED), FOLDER_PIECE_BYTES, licence)
