import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe_runtime.data.baseline import order1_bits_per_byte
from moe_runtime.data.bits import ByteCounter, bits_per_byte
from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import ByteTokenizer


def test_uniform_byte_model_costs_eight_bits_a_byte() -> None:
    targets = torch.randint(0, 256, (4, 50))
    num_bytes = ByteCounter(ByteTokenizer()).bytes_of(targets)
    assert num_bytes == 200
    assert bits_per_byte(200 * math.log(256), num_bytes) == pytest.approx(8.0)


def test_control_and_unknown_ids_stand_for_no_bytes() -> None:
    assert (
        ByteCounter(ByteTokenizer()).bytes_of(torch.tensor([65, 256, 257, 300, -1], dtype=torch.int32)) == 1
    )
    assert math.isnan(bits_per_byte(1.0, 0))


def test_bytes_of_targets_are_the_bytes_of_their_text(bpe_folder: Path) -> None:
    dataset = TokenDataset.open(bpe_folder, "validation")
    counter = ByteCounter(dataset.load_tokenizer())
    assert counter.bytes_of(torch.from_numpy(dataset.read(0, dataset.num_tokens))) == dataset.record.bytes


def slow_order1(train: list[bytes], validation: list[bytes]) -> float:
    pairs: Counter[tuple[int, int]] = Counter()
    for raw in train:
        pairs.update(zip([256, *raw], [*raw, 256], strict=True))
    firsts: Counter[int] = Counter()
    for (first, _), count in pairs.items():
        firsts[first] += count
    bits = 0.0
    for raw in validation:
        for first, second in zip([256, *raw], [*raw, 256], strict=True):
            bits -= math.log2((pairs[first, second] + 0.5) / (firsts[first] + 257 * 0.5))
    return bits / sum(map(len, validation))


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
def test_baseline_equals_the_slow_model_for_any_tokenizer(tokenizer: str, tmp_path: Path) -> None:
    texts = [f"a little {'text ' * (i % 5)} number {i * i}\n" for i in range(50)]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(Request(str(source), tokenizer, validation_fraction=0.2), tmp_path / "out", shard_tokens=77)
    train, validation = (TokenDataset.open(tmp_path / "out", split) for split in ("train", "validation"))
    text = [
        dataset.load_tokenizer()
        .decode(dataset.read(0, dataset.num_tokens))
        .encode()
        .splitlines(keepends=True)
        for dataset in (train, validation)
    ]
    assert [len(lines) for lines in text] == [40, 10]
    got = order1_bits_per_byte(train, validation, train.load_tokenizer())
    assert got == pytest.approx(slow_order1(*text), rel=1e-9)


def test_baseline_of_python_text_lies_where_it_should(byte_folder: Path) -> None:
    train, validation = (TokenDataset.open(byte_folder, split) for split in ("train", "validation"))
    assert 3.0 < order1_bits_per_byte(train, validation, ByteTokenizer()) < 4.0
