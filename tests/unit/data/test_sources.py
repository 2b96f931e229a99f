from collections import Counter
from pathlib import Path

import pytest

from moe_runtime.data.readers import TXT_PIECE_BYTES
from moe_runtime.data.sources import open_source
from moe_runtime.errors import DataError


def read(name: str) -> tuple[dict[str, str], Counter[str]]:
    counts: Counter[str] = Counter()
    return {document.name: document.text for document in open_source(name).read(counts)}, counts


def test_standard_library_is_there_without_its_tests() -> None:
    documents, counts = read("builtin:stdlib")
    assert len(documents) > 300
    assert documents["os.py"].startswith('r"""OS routines')
    assert not [
        name for name in documents if "/test/" in name or "/tests/" in name or "site-packages" in name
    ]
    assert not counts["not_utf8"]
    licence = open_source("builtin:stdlib").licence
    assert licence is not None
    assert licence.startswith("PSF-2.0")


def test_missing_standard_library_sources_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match="no Python sources under"):
        open_source("builtin:stdlib")


def test_folder_is_read_in_path_order_without_hidden_binary_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, raw in {
        "b/two.md": b"# two\r\n",
        "a.txt": "grün".encode(),
        "c.py": b"x = 1\n",
        "empty.txt": b"",
        "latin.rst": b"caf\xe9",
        "zero.txt": b"ab\0cd",
        "image.png": b"\x89PNG",
        ".hidden.txt": b"hidden",
        ".git/config.txt": b"hidden",
    }.items():
        (tmp_path / name).write_bytes(raw)
    documents, counts = read(f"dir:{tmp_path}")
    assert documents == {
        "a.txt": "grün",
        "c.py": "x = 1\n",
        "empty.txt": "",
        "latin.rst": "caf\ufffd",
        "b/two.md": "# two\r\n",
    }
    assert dict(counts) == {"not_utf8": 1, "binary_files": 1, "read_bytes": 27}


@pytest.mark.parametrize("line", ["ü" * 40 + "\n", "é€𝄞" * 9000, "x" * 50_000 + "\n" + "y\n" * 9])
def test_text_file_is_cut_in_pieces_that_join_to_the_whole(line: str, tmp_path: Path) -> None:
    text = line * 1000 if len(line) < 100 else line
    (tmp_path / "a.txt").write_text(text)
    documents, counts = read(str(tmp_path / "a.txt"))
    assert "".join(documents.values()) == text
    assert len(documents) > 2
    assert all(len(piece.encode()) <= 2 * TXT_PIECE_BYTES for piece in documents.values())
    assert not counts["not_utf8"]


def test_json_lines_are_read_by_their_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "one", "id": 1}\n\n{"text": ""}\n{"text": "\\ud800"}\n{"text": "caf\xe9"}')
    documents, counts = read(str(file))
    assert list(documents.values()) == ["one", "", "\ufffd", "caf\ufffd"]
    assert list(documents)[-1] == "a.jsonl:5"
    assert counts["not_utf8"] == 1


@pytest.mark.parametrize(
    "line, got",
    [
        ("{'text': 1}", "not JSON"),
        ('{"txt": "a"}', "got keys ['txt']"),
        ('{"text": 5}', "got int under 'text'"),
        ('["text"]', "got list"),
        ("[" * 100_000, "JSON"),
    ],
)
def test_bad_json_line_is_named_by_its_number(line: str, got: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a.jsonl:2: ") as error:
        read(str(file))
    assert got in str(error.value)


def test_parquet_is_read_by_its_text_column(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra [data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["one", None, "drei"], "id": [1, 2, 3]}), file)
    assert list(read(str(file))[0].values()) == ["one", "", "drei"]
    parquet.write_table(pyarrow.table({"body": ["one"]}), file)
    with pytest.raises(DataError, match="expected a column 'text', got body"):
        read(str(file))
    parquet.write_table(pyarrow.table({"text": [1]}), file)
    with pytest.raises(DataError, match="row 0: expected a string"):
        read(str(file))
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read(str(file))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    file = tmp_path / "a.parquet"
    file.touch()
    with pytest.raises(DataError, match="pip install pyarrow"):
        read(str(file))


@pytest.mark.parametrize("name", ["stdlib", "dir:/no/such/folder", "no.txt", "x.csv", ""])
def test_unknown_sources_are_one_line_errors(name: str) -> None:
    with pytest.raises(DataError) as error:
        open_source(name)
    assert "\n" not in str(error.value)


def test_folder_without_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \.json, \.md"):
        read(f"dir:{tmp_path}")
