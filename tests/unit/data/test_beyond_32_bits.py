"""Sets of more than 2^32 tokens, in files that are all hole but for the tokens looked at."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.manifest import MANIFEST
from moe_runtime.data.mixture_loader import MixtureLoader
from moe_runtime.data.order import permuted
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.writer import SplitWriter

SHARD = 2**31 + 2**20 + 3
SHARDS = 5  # 1.07e10 tokens, past 2^33
TOKENS = SHARD * SHARDS
MARK = 201
AT = (2**32 - 1, 2**32, 2**32 + 5, 2**33 + 1, SHARD * 2 - 1, SHARD * 2, TOKENS - 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zeros with a mark at each place of AT, all but the marks masked."""
    out = tmp_path_factory.mktemp("large") / "set"
    out.mkdir()
    content = json.dumps({"type": "moe_runtime byte", "specials": []}).encode()
    files = {"tokenizer.json": content, "train_documents.bin": np.array([0, TOKENS], "<u8").tobytes()}
    for name, raw in files.items():
        (out / name).write_bytes(raw)
    shards, masks = [], []
    for number in range(SHARDS):
        shard, mask = out / f"train_{number:05d}.bin", out / f"train_mask_{number:05d}.bin"
        with shard.open("wb") as ids, mask.open("wb") as bits:
            ids.truncate(2 * SHARD)
            bits.truncate((SHARD + 7) // 8)
            for place in (at - number * SHARD for at in AT if at // SHARD == number):
                ids.seek(2 * place)
                ids.write(np.array([MARK], "<u2").tobytes())
        packed = np.memmap(mask, dtype=np.uint8, mode="r+")
        for place in (at - number * SHARD for at in AT if at // SHARD == number):
            packed[place // 8] |= 1 << place % 8
        shards.append({"file": shard.name, "bytes": 2 * SHARD, "sha256": "0" * 64, "tokens": SHARD})
        masks.append({"file": mask.name, "bytes": (SHARD + 7) // 8, "sha256": "0" * 64})

    def record(name: str) -> dict[str, object]:
        raw = files[name]
        return {"file": name, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}

    train = {"tokens": TOKENS, "documents": 1, "bytes": TOKENS - 1, "max_id": MARK, "shards": shards}
    train |= {"masks": masks, "targets": len(AT), "index": record("train_documents.bin")}
    tokenizer = {"name": "byte", "vocab_size": 264, "eos_id": 256, "record": record("tokenizer.json")}
    manifest = {"dtype": "uint16", "tokenizer": tokenizer, "source": "none", "seed": 0, "fim_rate": 0.0}
    manifest |= {"validation_fraction": 0.1, "counts": {}, "splits": {"train": train}}
    (out / MANIFEST).write_text(json.dumps(manifest))
    assert sum(file.stat().st_blocks for file in out.iterdir()) * 512 < 10e6, "the files are not sparse"
    return out


def test_tokens_and_masks_are_found_at_any_offset(folder: Path) -> None:
    dataset = TokenDataset.open(folder)
    assert dataset.num_tokens == TOKENS > 2**33
    for at in AT:
        stretch = np.arange(at - 3, at + 4)
        marked = np.isin(stretch % TOKENS, AT)
        assert np.array_equal(dataset.read(at - 3, 7) == MARK, marked)
        assert np.array_equal(dataset.read_targets(at - 3, 7), marked)
        shard, place = divmod(at, SHARD)
        assert dataset.locate(at).endswith(f"train_{shard:05d}.bin, byte {2 * place}")
    assert dataset.document_starts().tolist() == [0, TOKENS]


def test_a_sequence_of_any_epoch_holds_the_tokens_of_its_place(folder: Path) -> None:
    seq_len = 4
    loader = BatchLoader(TokenDataset.open(folder), seq_len, 1, seed=3, vocab_size=264)
    samples = loader.samples_per_epoch
    assert samples == -(-TOKENS // seq_len) > 2**31
    numbers = np.array([0, 1, samples - 1, samples, 3 * samples + 17, 2**40 + 5])
    starts = loader.starts(numbers)
    epochs, places = np.divmod(numbers, samples)
    assert np.array_equal(starts, permuted(places, epochs, samples, 3) * seq_len)
    assert starts.max() > 2**32 and starts.min() >= 0 and starts.max() < TOKENS + seq_len
    for row, start in zip(loader.rows(numbers).numpy(), starts, strict=True):
        marked = np.isin(np.arange(start, start + len(row)) % TOKENS, AT)
        assert np.array_equal(row, np.where(marked, MARK, ~0))


def test_the_order_of_more_than_2_to_the_32_samples_has_no_sample_twice() -> None:
    size = 2**33 + 7
    places = np.concatenate([np.arange(50_000), size - 1 - np.arange(50_000)])
    found = permuted(places, np.zeros_like(places), size, seed=1)
    assert len(np.unique(found)) == len(places) and found.min() >= 0 and found.max() < size
    assert (found > 2**32).mean() == pytest.approx(0.5, abs=0.01)


def test_a_mixture_counts_beyond_32_bits(folder: Path) -> None:
    one = BatchLoader(TokenDataset.open(folder), 4, 0, seed=1, vocab_size=264)
    loader = MixtureLoader({"a": one, "b": one}, {"a": 3, "b": 1})
    number = 2**35
    assert loader.epochs(number)["a"] == 3 * number / 4 / one.samples_per_epoch
    rows = loader.rows([number, number + 1, number + 2, number + 3])
    own = sorted(int(n) for _, _, numbers in loader.mixture.locate(number + np.arange(4)) for n in numbers)
    assert own == [number // 4, 3 * number // 4, 3 * number // 4 + 1, 3 * number // 4 + 2]
    assert rows.shape == (4, 5)


def test_documents_are_listed_by_64_bits(tmp_path: Path) -> None:
    with SplitWriter(tmp_path, "train", "uint16") as writer:
        lengths = np.array([2**32 + 1, 2**33, 5], dtype=np.uint64)
        writer.add_documents(lengths, np.zeros(3, dtype=np.uint32), ["."])
        writer.add_documents(np.array([7], dtype=np.uint64), np.zeros(1, dtype=np.uint32), ["."])
        writer._index.close()
        writer._parts.close()
    starts = np.fromfile(tmp_path / "train_documents.bin", "<u8").tolist()
    assert starts == [0, 2**32 + 1, 2**32 + 1 + 2**33, 2**32 + 6 + 2**33]
