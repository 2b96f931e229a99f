import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.order import permuted
from moe_runtime.data.shards import TokenDataset
from moe_runtime.errors import DataError

SEQ_LEN, DEPTH = 100, 2


@pytest.fixture
def loader(byte_folder: Path) -> BatchLoader:
    return BatchLoader(TokenDataset.open(byte_folder), SEQ_LEN, DEPTH, seed=7, vocab_size=264)


def oracle(folder: Path, split: str, seed: int, numbers: list[int]) -> np.ndarray:
    """Everything in memory, one sequence at a time."""
    stream = np.concatenate([np.fromfile(file, "<u2") for file in sorted(folder.glob(f"{split}_0*.bin"))])
    samples = (len(stream) + SEQ_LEN - 1) // SEQ_LEN
    twice = np.concatenate([stream, stream]).astype(np.int64)
    rows = []
    for number in numbers:
        order = permuted(np.arange(samples), np.full(samples, number // samples), samples, seed)
        start = order[number % samples] * SEQ_LEN
        rows.append(twice[start : start + SEQ_LEN + 1 + DEPTH])
    return np.stack(rows)


def test_rows_equal_the_oracle_in_any_epoch(loader: BatchLoader, byte_folder: Path) -> None:
    epoch = loader.samples_per_epoch
    numbers = [0, 1, 5, epoch - 1, epoch, epoch + 1, 3 * epoch + 17, 5]
    rows = loader.rows(numbers)
    assert (rows.dtype, tuple(rows.shape)) == (torch.int64, (8, SEQ_LEN + 1 + DEPTH))
    assert np.array_equal(rows.numpy(), oracle(byte_folder, "train", 7, numbers))
    assert loader.epochs(epoch) == {"": 1.0}


def test_every_token_is_a_target_once_an_epoch(loader: BatchLoader, byte_folder: Path) -> None:
    rows = loader.sequences(0, loader.samples_per_epoch)
    stream = TokenDataset.open(byte_folder).read(0, loader.dataset.num_tokens)
    extra = loader.samples_per_epoch * SEQ_LEN - len(stream)  # the last sample goes on at the start
    seen = np.bincount(rows[:, 1 : SEQ_LEN + 1].ravel().numpy(), minlength=264)
    again = np.bincount(stream[1 : extra + 1], minlength=264)
    assert np.array_equal(seen - again, np.bincount(stream, minlength=264))


def test_last_sample_goes_on_at_the_start(loader: BatchLoader) -> None:
    size, samples = loader.dataset.num_tokens, loader.samples_per_epoch
    starts = permuted(np.arange(samples), np.zeros(samples, dtype=np.int64), samples, 7)
    row = loader.rows([int(np.argmax(starts))])[0].numpy()
    tail = size - (samples - 1) * SEQ_LEN
    assert np.array_equal(row[tail:], loader.dataset.read(0, SEQ_LEN + 1 + DEPTH - tail))


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_lanes_together_see_the_same_global_batch(lanes: int, loader: BatchLoader) -> None:
    first, count = 1000, 24
    rows = torch.cat([loader.rows(range(first + lane, first + count, lanes)) for lane in range(lanes)])
    places = [n - first for lane in range(lanes) for n in range(first + lane, first + count, lanes)]
    assert torch.equal(rows, loader.sequences(first, count)[places])


def test_resuming_needs_the_number_alone(loader: BatchLoader, byte_folder: Path) -> None:
    walked = [loader.sequences(8 * step, 8) for step in range(40)]
    fresh = BatchLoader(TokenDataset.open(byte_folder), SEQ_LEN, DEPTH, seed=7)
    assert torch.equal(fresh.sequences(8 * 31, 8), walked[31])


def test_seed_changes_the_order(loader: BatchLoader) -> None:
    other = BatchLoader(loader.dataset, SEQ_LEN, DEPTH, seed=8)
    assert not torch.equal(other.sequences(0, 4), loader.sequences(0, 4))


def test_no_rows_is_an_empty_batch(loader: BatchLoader) -> None:
    assert tuple(loader.rows([]).shape) == (0, SEQ_LEN + 1 + DEPTH)


def test_validation_batches_are_the_same_each_time_and_end(byte_folder: Path) -> None:
    loader = BatchLoader(TokenDataset.open(byte_folder, "validation"), SEQ_LEN, DEPTH, seed=0)
    batches = list(loader.validation_batches(20, batch_size=8))
    assert [len(batch) for batch in batches] == [8, 8, 4]
    again = torch.cat(list(loader.validation_batches(20, batch_size=5)))
    assert torch.equal(torch.cat(batches), again)
    assert sum(map(len, loader.validation_batches(10**9, 64))) == loader.samples_per_epoch


def test_small_vocabulary_is_refused_before_training(byte_folder: Path) -> None:
    with pytest.raises(
        DataError, match=r"holds token id 256, but model.vocab_size is 256; set it to at least 264"
    ):
        BatchLoader(TokenDataset.open(byte_folder), SEQ_LEN, DEPTH, seed=0, vocab_size=256)


def test_split_shorter_than_a_sequence_is_refused(byte_folder: Path) -> None:
    with pytest.raises(DataError, match=r"fewer than one sequence of 10000002"):
        BatchLoader(TokenDataset.open(byte_folder), 10_000_000, 1, seed=0)


def test_id_out_of_range_is_named_by_file_and_offset(byte_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(byte_folder, tmp_path / "copy"))
    raw = np.fromfile(folder / "train_00001.bin", "<u2")
    raw[5] = 60_000
    raw.tofile(folder / "train_00001.bin")
    loader = BatchLoader(TokenDataset.open(folder, verify=False), SEQ_LEN, DEPTH, seed=0, vocab_size=264)
    with pytest.raises(DataError, match=r"train_00001.bin, byte 10: token id 60000 is not below 264"):
        loader.sequences(0, loader.samples_per_epoch)
