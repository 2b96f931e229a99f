"""Documents out of a source: the standard library, a folder, or a .txt, .jsonl or .parquet file.

A source can be read any number of times and gives the same documents in the same order each time.
What is not UTF-8 is read with U+FFFD in its place and counted; files that hold a zero byte are
taken for binary, skipped and counted.
"""

import json
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from moe_runtime.data.vocabulary import scalar_text
from moe_runtime.errors import DataError

TEXT_SUFFIXES = (".json", ".md", ".py", ".rst", ".txt")
# A single .txt is cut into documents of about this size, so that there is something to split into
# training and validation; files of a folder stay whole unless memory would suffer.
TXT_PIECE_BYTES = 16 * 1024
FOLDER_PIECE_BYTES = 4 * 1024 * 1024
STDLIB_SKIPPED = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test"},
)
EXPECTED = "expected builtin:stdlib, dir:PATH, or a .txt, .jsonl or .parquet file"


class Document(NamedTuple):
    """One text of a source.

    Args:
        name: says where it came from, for messages.
        part: of the source that it belongs to: the first folder below the root ('.' for files that lie
            there), what a line of JSON says under `source`, else the file. Losses are told apart by it.
    """

    name: str
    text: str
    part: str


class Source(Protocol):
    """Where documents come from."""

    @property
    def name(self) -> str:
        """As the user spells it."""
        ...

    @property
    def licence(self) -> str | None:
        """What is known about the licence of the text."""
        ...

    def read(self, counts: Counter[str]) -> Iterator[Document]:
        """All documents in a fixed order; adds to `counts`: binary_files, not_utf8.

        Raises:
            DataError: a file cannot be read or is not what its name says.
        """
        ...


@dataclass(frozen=True)
class FolderSource:
    """Text files below a folder, in the order of their paths; each file is a document.

    Hidden files and folders and links to folders are left out.
    """

    name: str
    root: Path
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    skipped_folders: frozenset[str] = frozenset()
    licence: str | None = None

    def read(self, counts: Counter[str]) -> Iterator[Document]:
        found = False
        for file in self._files():
            found = True
            inside = file.relative_to(self.root)
            part = inside.parts[0] if len(inside.parts) > 1 else "."
            yield from _read_text(file, inside.as_posix(), part, FOLDER_PIECE_BYTES, counts)
        if not found:
            raise DataError(f"source {self.name}: no {', '.join(self.suffixes)} files under {self.root}")

    def _files(self) -> Iterator[Path]:
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(
                name for name in folders if name not in self.skipped_folders and not name.startswith(".")
            )
            for name in sorted(files):
                if name.endswith(self.suffixes) and not name.startswith("."):
                    yield Path(folder, name)


@dataclass(frozen=True)
class TextSource:
    """One text file, cut at line ends into documents of about 16 KiB."""

    name: str
    file: Path
    licence: str | None = None

    def read(self, counts: Counter[str]) -> Iterator[Document]:
        yield from _read_text(self.file, self.file.name, self.file.name, TXT_PIECE_BYTES, counts)


@dataclass(frozen=True)
class JsonLinesSource:
    """One JSON object a line: key `text` is the document, `source` its part. Blank lines are skipped."""

    name: str
    file: Path
    licence: str | None = None

    def read(self, counts: Counter[str]) -> Iterator[Document]:
        with _open(self.file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    value = _json_object(_decode(line, counts), f"{self.file}:{number}")
                    said = value.get("source")
                    part = scalar_text(said) if isinstance(said, str) and said else self.file.name
                    yield Document(f"{self.file.name}:{number}", scalar_text(value["text"]), part)


@dataclass(frozen=True)
class ParquetSource:
    """A Parquet file; the column `text` holds the documents. Read batch by batch with pyarrow."""

    name: str
    file: Path
    licence: str | None = None

    def read(self, counts: Counter[str]) -> Iterator[Document]:
        row = 0
        for batch in self._batches():
            for value in batch.column("text").to_pylist():
                if value is not None and not isinstance(value, str):
                    got = type(value).__name__
                    raise DataError(f"{self.file}: row {row}: expected a string in column 'text', got {got}")
                yield Document(f"{self.file.name}:{row}", value or "", self.file.name)
                row += 1

    def _batches(self) -> Iterator[Any]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise DataError(
                f"{self.file}: reading .parquet needs pyarrow; install it with: pip install pyarrow"
            ) from error
        try:
            with parquet.ParquetFile(self.file) as table:
                if "text" not in table.schema_arrow.names:
                    got = ", ".join(table.schema_arrow.names)
                    raise DataError(f"{self.file}: expected a column 'text', got {got}")
                yield from table.iter_batches(batch_size=1024, columns=["text"])
        except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{self.file}: not readable as Parquet: {str(error).splitlines()[0]}") from error


def open_source(name: str) -> Source:
    """The source of a name: builtin:stdlib, dir:PATH, or a .txt, .jsonl or .parquet file.

    Raises:
        DataError: unknown name, or nothing is there.
    """
    if name == "builtin:stdlib":
        return _stdlib()
    if name.startswith("dir:"):
        root = Path(name[4:]).expanduser()
        if not root.is_dir():
            raise DataError(f"source {name}: no such folder: {root}")
        return FolderSource(name, root)
    file = Path(name).expanduser()
    kinds: dict[str, Callable[[str, Path], Source]] = {
        ".txt": TextSource,
        ".jsonl": JsonLinesSource,
        ".parquet": ParquetSource,
    }
    if file.suffix not in kinds:
        raise DataError(f"source {name!r}: {EXPECTED}")
    if not file.is_file():
        raise DataError(f"source {name!r}: no such file")
    return kinds[file.suffix](name, file)


def _stdlib() -> FolderSource:
    """Python's own library without its tests: about 12 MB of source text."""
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DataError(
            f"source builtin:stdlib: no Python sources under {root} (this Python ships compiled files only); "
            "use dir:PATH or a .txt, .jsonl or .parquet file"
        )
    licence = f"PSF-2.0; standard library of {platform.python_implementation()} {platform.python_version()}"
    return FolderSource("builtin:stdlib", root, (".py",), STDLIB_SKIPPED, licence)


def _open(file: Path) -> Any:
    try:
        return file.open("rb")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error


def _read_text(
    file: Path, name: str, part: str, piece_bytes: int, counts: Counter[str]
) -> Iterator[Document]:
    """The pieces of one text file; a piece ends at a line end where it can."""
    with _open(file) as stream:
        rest, place = b"", 0
        while True:
            block = stream.read(piece_bytes)
            if place == 0 and not rest and b"\0" in block[:8192]:
                counts["binary_files"] += 1
                return
            raw = rest + block
            cut = _cut(raw) if len(block) == piece_bytes else len(raw)
            if cut or place == 0:
                piece = name if place == 0 else f"{name}@{place}"
                yield Document(piece, _decode(raw[:cut], counts), part)
            place, rest = place + cut, raw[cut:]
            if len(block) < piece_bytes:
                return


def _cut(raw: bytes) -> int:
    """Where to cut: after the last line end, else before the last character that may be incomplete."""
    line_end = raw.rfind(b"\n") + 1
    if line_end:
        return line_end
    for back in range(1, min(4, len(raw)) + 1):
        if raw[-back] & 0xC0 != 0x80:  # first byte of a character
            return len(raw) - back or len(raw)
    return len(raw)


def _decode(raw: bytes, counts: Counter[str]) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        counts["not_utf8"] += 1
        return raw.decode("utf-8", "replace")


def _json_object(line: str, where: str) -> dict[str, Any]:
    """One line of JSON with a string under `text`."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON (column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        got = f"keys {sorted(value)[:8]}" if isinstance(value, dict) else type(value).__name__
        if isinstance(value, dict) and "text" in value:
            got = f"{type(value['text']).__name__} under 'text'"
        raise DataError(f"{where}: expected an object with a string under 'text', got {got}")
    return value
