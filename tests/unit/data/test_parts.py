"""Which part of a source each document is of: recorded by `prepare`, read back, absent in older folders."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.data.manifest import MANIFEST
from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.sources import open_source
from moe_runtime.data.task import Request
from moe_runtime.data.writer import MAX_PARTS, OTHER_PARTS, SplitWriter
from moe_runtime.errors import DataError


def parts_of(name: str) -> list[str]:
    return [document.part for document in open_source(name).read(Counter())]


def test_each_kind_of_source_names_its_parts(tmp_path: Path) -> None:
    for place in ("top.txt", "one/a.txt", "one/deep/b.txt", "two/c.txt"):
        (tmp_path / "texts" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / place).write_text(place)
    assert parts_of(f"dir:{tmp_path / 'texts'}") == [".", "one", "one", "two"]
    file = tmp_path / "mixed.jsonl"
    lines = [
        {"text": "a", "source": "web"},
        {"text": "b"},
        {"text": "c", "source": 3},
        {"text": "d", "source": ""},
    ]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert parts_of(str(file)) == ["web", "mixed.jsonl", "mixed.jsonl", "mixed.jsonl"]
    (tmp_path / "plain.txt").write_text("x\n" * 20_000)
    assert set(parts_of(str(tmp_path / "plain.txt"))) == {"plain.txt"}
    assert {".", "json", "email"} <= set(parts_of("builtin:stdlib"))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    file = tmp_path / "mixed.jsonl"
    lines = [{"text": f"text {number}", "source": "xyz"[number % 3]} for number in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    prepare(Request(str(file), "byte", validation_fraction=0.3), tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_prepared_folder_knows_the_part_of_each_document(prepared: Path, split: str) -> None:
    dataset = TokenDataset.open(prepared, split)  # type: ignore[arg-type]
    parts, names = dataset.document_parts()
    starts, tokenizer = dataset.document_starts().astype(np.int64), dataset.load_tokenizer()
    assert len(parts) == dataset.record.documents == len(starts) - 1
    for part, start, end in zip(parts, starts, starts[1:], strict=False):
        number = int(tokenizer.decode(dataset.read(int(start), int(end - start))).split()[1])
        assert names[part] == "xyz"[number % 3]


def test_a_folder_without_the_record_is_one_part(prepared: Path) -> None:
    manifest = json.loads((prepared / MANIFEST).read_text())
    for split in manifest["splits"].values():
        (prepared / split["parts"]["file"]).unlink()
        del split["parts"], split["part_names"]
    (prepared / MANIFEST).write_text(json.dumps(manifest))
    dataset = TokenDataset.open(prepared, "validation")
    parts, names = dataset.document_parts()
    assert names == (manifest["source"],) and parts.tolist() == [0] * dataset.record.documents


def test_a_changed_record_is_noticed(prepared: Path) -> None:
    file = prepared / "validation_parts.bin"
    file.write_bytes(bytes(len(file.read_bytes())))
    with pytest.raises(DataError, match=r"validation_parts.bin: damaged"):
        TokenDataset.open(prepared, "validation")


def test_too_many_parts_are_one_from_some_number_on(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "train", "uint16") as writer:
        for number in range(MAX_PARTS + 5):
            writer.add_documents(np.array([2]), np.array([0]), [f"https://{number}"])
            writer.add_tokens(np.array([1, 2]))
        record = writer.close({"bytes": 2, "max_id": 2})
    assert len(record.part_names) == MAX_PARTS + 1 and record.part_names[-1] == OTHER_PARTS
    assert record.parts is not None and record.parts.bytes == 2 * (MAX_PARTS + 5)
