"""Tokens that are read but not predicted: from a line of JSON to a row of tokens and to bits per byte."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe_runtime.config.data import DataConfig, TextForm
from moe_runtime.data.bits import ByteCounter
from moe_runtime.data.documents import document_of, pieces_of
from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.manifest import read_manifest
from moe_runtime.data.prepare import ensure_prepared, prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import ByteTokenizer
from moe_runtime.errors import DataError
from moe_runtime.model.targets import count_targets, token_ids

PAIR = TextForm(fields=("prompt", "answer"), loss_on=("answer",))
CHAT = TextForm(fields=("messages",))


def marked(value: dict[str, Any], form: TextForm) -> str:
    """The text with brackets round what is to be predicted."""
    pieces = pieces_of(document_of(value, form, "name", "where", "file"))
    return "".join(f"[{text}]" if is_target else text for text, is_target in pieces)


@pytest.mark.parametrize(
    "value, form, expected",
    [
        ({"text": "all"}, TextForm(), "[all]"),
        ({"text": "some of it", "loss_spans": [[0, 4], [5, 7]]}, TextForm(), "[some] [of] it"),
        ({"text": "none", "loss_spans": []}, TextForm(), "none"),
        ({"text": "whole", "loss_spans": [[0, 2], [2, 5]]}, TextForm(), "[wh][ole]"),
        ({"prompt": "1+1=", "answer": "2"}, PAIR, "1+1=[2]"),
        ({"prompt": "", "answer": "2"}, PAIR, "[2]"),
        ({"prompt": "only", "answer": ""}, PAIR, "only"),
        ({"prompt": "a", "answer": "b"}, TextForm(fields=("answer", "prompt")), "[ba]"),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]},
            CHAT,
            "user: Hi\nassistant: [Yes\n]",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": "bad", "loss": False},
                    {"role": "user", "content": "x", "loss": True},
                ]
            },
            TextForm(fields=("messages",), message_format="<{role}>{content}</{role}>"),
            "<assistant>bad</assistant><user>[x</user>]",
        ),
    ],
)
def test_forms_say_what_is_predicted(value: dict[str, Any], form: TextForm, expected: str) -> None:
    assert marked(value, form) == expected


@pytest.mark.parametrize(
    "value, form, said",
    [
        ({"text": "abc", "loss_spans": [[0, 4]]}, TextForm(), "within 0..3, got [0, 4]"),
        ({"text": "abc", "loss_spans": [[1, 2], [0, 1]]}, TextForm(), "got [0, 1]"),
        ({"text": "abc", "loss_spans": [[1.0, 2]]}, TextForm(), "got [1.0, 2]"),
        ({"text": "abc", "loss_spans": "all"}, TextForm(), "got all"),
        ({"text": "abc", "answer": "x", "prompt": "y", "loss_spans": []}, PAIR, "data.form"),
        ({"prompt": "abc"}, PAIR, "a string under 'prompt' and 'answer', got keys ['prompt']"),
        ({"messages": "hello"}, CHAT, "a list under 'messages', got str"),
        ({"messages": [{"role": "user"}]}, CHAT, "message 0: expected strings under 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": "x", "loss": 1}]}, CHAT, "true or false"),
        ({"messages": []}, TextForm(), "got keys ['messages']; set --fields messages (data.form.fields)"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(value: dict[str, Any], form: TextForm, said: str) -> None:
    with pytest.raises(DataError) as error:
        document_of(value, form, "name", "a.jsonl:3", "file")
    assert str(error.value).startswith("a.jsonl:3: ") and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of small letters and answers of large ones, in shards whose borders fall anywhere."""
    place = tmp_path_factory.mktemp("masked")
    generator = np.random.default_rng(4)
    lines = [
        {
            "prompt": "abc"[number % 3] * generator.integers(0, 30),
            "answer": "X" * generator.integers(1, 20) + str(number),
        }
        for number in range(80)
    ]
    (place / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(Request(str(place / "a.jsonl"), form=PAIR), place / "out", shard_tokens=501)
    return place / "out"


def test_masks_lie_beside_the_tokens_bit_by_bit(folder: Path) -> None:
    dataset = TokenDataset.open(folder)
    record = dataset.record
    assert [mask.bytes for mask in record.masks] == [(shard.tokens + 7) // 8 for shard in record.shards]
    ids, targets = dataset.read(0, dataset.num_tokens), dataset.read_targets(0, dataset.num_tokens)
    assert record.targets == targets.sum() < record.tokens
    is_prompt = (ids >= ord("a")) & (ids <= ord("z"))
    assert np.array_equal(targets, ~is_prompt)  # the end of a document follows an answer: it is a target
    for start in (0, 497, 499, 500, 501, 505, dataset.num_tokens - 3):
        for count in (0, 1, 7, 9, 1200):
            wanted = np.take(targets, range(start, start + count), mode="wrap")
            assert np.array_equal(dataset.read_targets(start, count), wanted)


def test_a_row_has_masked_tokens_as_their_complement(folder: Path) -> None:
    loader = BatchLoader(TokenDataset.open(folder), 40, 1, seed=1, vocab_size=264)
    assert loader.is_masked
    numbers = range(2 * loader.samples_per_epoch)
    for row, start in zip(loader.rows(numbers), loader.starts(list(numbers)), strict=True):
        ids = loader.dataset.read(int(start), 42)
        targets = loader.dataset.read_targets(int(start), 42)
        assert np.array_equal(token_ids(row).numpy(), ids)
        assert np.array_equal(row.numpy() >= 0, targets)


def test_targets_are_counted_for_each_head() -> None:
    rows = torch.tensor([[0, ~1, 2, ~3, 4, 5], [~0, ~1, ~2, ~3, ~4, 5]])
    assert count_targets(rows, 3, 2).tolist() == [1, 2, 3]


def test_bits_per_byte_are_over_targets_alone() -> None:
    counter = ByteCounter(ByteTokenizer())
    assert counter.bytes_of(torch.tensor([65, ~66, 67, 256, ~256])) == 2


def test_a_changed_mask_is_noticed_and_counts_for_the_fingerprint(folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(folder)
    unmasked = {name: split.model_copy(update={"masks": ()}) for name, split in manifest.splits.items()}
    plain = manifest.model_copy(update={"splits": unmasked})
    assert plain.fingerprint != manifest.fingerprint
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    raw = bytearray((copy / "train_mask_00001.bin").read_bytes())
    raw[3] ^= 1
    (copy / "train_mask_00001.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"train_mask_00001.bin: damaged"):
        TokenDataset.open(copy)
    (copy / "train_mask_00001.bin").write_bytes(raw[:-1])
    with pytest.raises(DataError, match=r"train_mask_00001.bin: expected 63 bytes, got 62"):
        TokenDataset.open(copy)


def test_data_of_another_form_is_refused(folder: Path) -> None:
    ensure_prepared(DataConfig(path=str(folder), form=PAIR), seed=1)
    with pytest.raises(DataError) as error:
        ensure_prepared(DataConfig(path=str(folder)), seed=1)
    assert "set data.form={fields: [prompt, answer], loss_on: [answer]}" in str(error.value)


def test_folders_without_masks_stay_as_they_were(byte_folder: Path) -> None:
    said = json.loads((byte_folder / "manifest.json").read_text())
    assert "form" not in said and not {"masks", "targets"} & said["splits"]["train"].keys()
