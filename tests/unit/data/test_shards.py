import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import DataError


@pytest.fixture
def folder(byte_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(byte_folder, tmp_path / "copy"))


def whole(folder: Path, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(file, "<u2") for file in sorted(folder.glob(f"{split}_0*.bin"))])


def change(folder: Path, **values: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_reading_crosses_shard_borders_and_wraps(byte_folder: Path) -> None:
    dataset, tokens = TokenDataset.open(byte_folder), whole(byte_folder, "train")
    assert len(dataset.record.shards) > 3
    size = len(tokens)
    for start in (0, 29_999, 30_000, 59_990, size - 5, size, 3 * size + 7):
        for count in (0, 1, 20, 70_000):
            assert np.array_equal(
                dataset.read(start, count), np.take(tokens, range(start, start + count), mode="wrap")
            )


def test_location_names_file_and_byte(byte_folder: Path) -> None:
    assert TokenDataset.open(byte_folder).locate(30_001).endswith("train_00001.bin, byte 2")


def test_truncated_shard_is_named_with_its_sizes(folder: Path) -> None:
    with (folder / "train_00001.bin").open("r+b") as file:
        file.truncate(59_999)
    with pytest.raises(DataError, match=r"train_00001.bin: expected 60000 bytes, got 59999"):
        TokenDataset.open(folder, verify=False)
    TokenDataset.open(folder, "validation")


def test_missing_shard_is_named(folder: Path) -> None:
    (folder / "validation_00000.bin").unlink()
    with pytest.raises(DataError, match=r"validation_00000.bin: expected \d+ bytes, no such file"):
        TokenDataset.open(folder, "validation")


@pytest.mark.parametrize("file", ["train_00002.bin", "train_documents.bin"])
def test_one_flipped_bit_is_found_by_verifying(file: str, folder: Path) -> None:
    raw = bytearray((folder / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (folder / file).write_bytes(raw)
    TokenDataset.open(folder, verify=False)
    for verify in (True, None):
        with pytest.raises(DataError, match=f"{file}: damaged: expected sha256"):
            TokenDataset.open(folder, verify=verify)


def test_changed_tokenizer_is_found(folder: Path) -> None:
    with (folder / "tokenizer.json").open("a") as file:
        file.write(" ")
    with pytest.raises(DataError, match=r"tokenizer.json: damaged"):
        TokenDataset.open(folder).load_tokenizer()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "null", "\x00"])
def test_damaged_manifest_is_one_line(content: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest.json: .*prepare the data again") as error:
        TokenDataset.open(folder)
    assert "\n" not in str(error.value)


def test_manifest_of_another_version_or_kind_is_refused(folder: Path) -> None:
    change(folder, version=2)
    with pytest.raises(DataError, match="expected format version 1, got 2"):
        TokenDataset.open(folder)
    change(folder, version=1, format="something else")
    with pytest.raises(DataError, match="format: "):
        TokenDataset.open(folder)


def test_manifest_cannot_point_outside_its_folder(folder: Path) -> None:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["shards"][0]["file"] = "../secret.bin"
    change(folder, splits=splits)
    with pytest.raises(DataError, match=r"splits.train.shards.0.file"):
        TokenDataset.open(folder)


def test_counts_that_do_not_add_up_are_refused(folder: Path) -> None:
    splits = json.loads((folder / "manifest.json").read_text())["splits"]
    splits["train"]["tokens"] += 1
    change(folder, splits=splits)
    with pytest.raises(DataError, match="do not add up"):
        TokenDataset.open(folder)


def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest.json is missing"):
        TokenDataset.open(tmp_path / "nothing")
