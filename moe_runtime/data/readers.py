"""Documents out of one part of one file: text, lines of JSON or Parquet, compressed or not.

A part is a range of bytes that begins and ends where a document may, or a range of row groups. So a file of
any size is read by several processes, each with the memory of one document. Compressed files cannot be
entered in the middle: they are one part.

`counts["read_bytes"]` grows with the bytes of the file that have been read, for a display of progress.
"""

import bz2
import gzip
import io
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moe_runtime.config.data import TextForm
from moe_runtime.data.documents import Document, document_of
from moe_runtime.errors import DataError

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
# A single .txt is cut into documents of about this size, so that there is something to split into
# training and validation; files of a folder stay whole unless memory would suffer.
TXT_PIECE_BYTES = 16 * 1024
FOLDER_PIECE_BYTES = 4 * 1024 * 1024


class FilePart(NamedTuple):
    """A range of a file.

    Args:
        file: its path.
        name: what messages call it.
        part: which part of the source its documents are, unless they say so themselves.
        kind: text, jsonl or parquet.
        start: first byte, or first row group.
        end: the one after the last.
        piece_bytes: size of documents that text is cut into.
        num_bytes: of the file, that this part stands for.
    """

    file: str
    name: str
    part: str
    kind: str
    start: int
    end: int
    piece_bytes: int
    num_bytes: int


def kind_of(file: Path) -> tuple[str, bool]:
    """What a file holds by its name, and whether it is compressed: ("jsonl", True) of a.jsonl.gz."""
    is_compressed = file.suffix in COMPRESSED
    inner = Path(file.stem).suffix if is_compressed else file.suffix
    return {".jsonl": "jsonl", ".parquet": "parquet"}.get(inner, "text"), is_compressed


def read_part(part: FilePart, form: TextForm, counts: Counter[str]) -> Iterator[Document]:
    """All documents of a part in order; adds to `counts`: read_bytes, binary_files, not_utf8.

    Raises:
        DataError: the file cannot be read or is not what its name says.
    """
    if part.kind == "parquet":
        yield from _rows(part, form, counts)
        return
    read = _lines if part.kind == "jsonl" else _pieces
    try:
        with _opened(part, counts) as stream:
            yield from read(stream, part, form, counts)
    except OSError as error:  # gzip's own errors are of this kind too
        raise DataError(f"{part.file}: {error.strerror or error}") from error
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{part.file}: damaged: {error}") from error


class _Counted(io.RawIOBase):
    """A range of a file, read once from its start to its end; counts what has been read."""

    def __init__(self, part: FilePart, counts: Counter[str]) -> None:
        super().__init__()
        self._left, self._counts = part.end - part.start, counts
        self._file = Path(part.file).open("rb")  # noqa: SIM115 - closed with this stream
        self._file.seek(part.start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raw = self._file.read(min(len(buffer), self._left))
        self._left -= len(raw)
        self._counts["read_bytes"] += len(raw)
        buffer[: len(raw)] = raw
        return len(raw)

    def close(self) -> None:
        self._file.close()
        super().close()


def _opened(part: FilePart, counts: Counter[str]) -> Any:
    """The bytes of a part, decompressed."""
    stream = io.BufferedReader(_Counted(part, counts), 1024 * 1024)
    openers: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": lambda raw: _unzstd(raw, part.file),
    }
    return openers.get(Path(part.file).suffix, lambda raw: raw)(stream)


def _unzstd(raw: Any, file: str) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(
            f"{file}: reading .zst needs pyarrow; install it with: pip install pyarrow"
        ) from error
    return io.BufferedReader(_Arrow(pyarrow.input_stream(raw, compression="zstd")), 1024 * 1024)


class _Arrow(io.RawIOBase):
    """A stream of pyarrow as one of Python's."""

    def __init__(self, stream: Any) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raw = self._stream.read(len(buffer))
        buffer[: len(raw)] = raw
        return len(raw)


def _lines(stream: Any, part: FilePart, form: TextForm, counts: Counter[str]) -> Iterator[Document]:
    """Documents of lines of JSON; they are named by line, or by byte where lines before were not read."""
    place = part.start
    for number, line in enumerate(stream, start=1):
        if line.strip():
            at = f":{number}" if part.start == 0 else f", byte {place}"
            value = _json(_decode(line, counts), f"{part.file}{at}")
            yield document_of(value, form, f"{part.name}{at}", f"{part.file}{at}", part.part)
        place += len(line)


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line.removeprefix("\ufeff"))  # some programs begin a file with this mark
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON (column {error.colno}: {error.msg})") from error
    except RecursionError as error:
        raise DataError(f"{where}: JSON nested too deeply") from error


def _pieces(stream: Any, part: FilePart, form: TextForm, counts: Counter[str]) -> Iterator[Document]:
    """The pieces of one text file; a piece ends at a line end where it can."""
    rest, place, size = b"", part.start, part.piece_bytes
    while True:
        block = stream.read(size)
        if place == 0 and not rest and b"\0" in block[:8192]:
            counts["binary_files"] += 1
            return
        raw = rest + block
        cut = _cut(raw) if len(block) == size else len(raw)
        if cut or place == 0:
            name = part.name if place == 0 else f"{part.name}@{place}"
            yield Document(name, _decode(raw[:cut], counts), part.part)
        place, rest = place + cut, raw[cut:]
        if len(block) < size:
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


def open_parquet(file: str) -> Any:
    """A Parquet file, opened.

    Raises:
        DataError: no pyarrow, or not such a file.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(
            f"{file}: reading .parquet needs pyarrow; install it with: pip install pyarrow"
        ) from error
    try:
        return parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: not readable as Parquet: {str(error).splitlines()[0]}") from error


def _rows(part: FilePart, form: TextForm, counts: Counter[str]) -> Iterator[Document]:
    """Documents of the rows of some row groups, read batch by batch; a null is an empty document."""
    with open_parquet(part.file) as table:
        names = table.schema_arrow.names
        missing = [key for key in form.fields if key not in names]
        if missing:
            raise DataError(f"{part.file}: expected a column {missing[0]!r}, got {', '.join(names)}")
        wanted = [*form.fields, *(key for key in ("source", "loss_spans") if key in names)]
        row = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
        total = sum(table.metadata.row_group(g).num_rows for g in range(part.start, part.end))
        first = row
        for batch in _batches(table, part, wanted):
            for value in batch.to_pylist():
                for key in form.fields:
                    value[key] = _no_null(value[key], key, f"{part.file}: row {row}")
                if value.get("loss_spans", ...) is None:
                    del value["loss_spans"]
                yield document_of(value, form, f"{part.name}:{row}", f"{part.file}: row {row}", part.part)
                row += 1
            counts["read_bytes"] = part.num_bytes * (row - first) // max(1, total)


def _no_null(value: Any, key: str, where: str) -> Any:
    if value is not None and not isinstance(value, list if key == "messages" else str):
        got = type(value).__name__
        raise DataError(f"{where}: expected a string in column {key!r}, got {got}")
    return ([] if key == "messages" else "") if value is None else value


def _batches(table: Any, part: FilePart, wanted: list[str]) -> Iterator[Any]:
    import pyarrow

    try:
        groups = list(range(part.start, part.end))
        yield from table.iter_batches(batch_size=1024, row_groups=groups, columns=wanted)
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{part.file}: not readable as Parquet: {str(error).splitlines()[0]}") from error
