"""Whatever happens to the files: what is found is true, or less is found."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moe_runtime.generate.prefix_blocks import blocks_of
from moe_runtime.generate.prefix_file import BlockFile
from moe_runtime.generate.prefix_fingerprint import LatentForm
from moe_runtime.generate.prefix_folder import name_of
from tests.unit.generate.prefix_samples import (
    FORM,
    block_files,
    cache_of,
    latents_of,
    learn,
    text_of,
    true_blocks,
)

# Three texts with common beginnings: seven blocks.
TEXTS = (text_of(1, 2, 3), text_of(1, 2, 4, 5), text_of(6, 2, tail=9))
NUM_BLOCKS = 7


def flip_bit(files: list[Path], rng: random.Random) -> None:
    data = bytearray(files[0].read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[0].write_bytes(data)


def overwrite_part(files: list[Path], rng: random.Random) -> None:
    data = bytearray(files[0].read_bytes())
    start, length = rng.randrange(len(data)), rng.randrange(1, 600)
    part = bytes(length) if rng.random() < 0.5 else rng.randbytes(length)  # a hole, or garbage
    data[start : start + length] = part[: len(data) - start]
    files[0].write_bytes(data)


def move_part(files: list[Path], rng: random.Random) -> None:
    data = bytearray(files[0].read_bytes())
    length = rng.randrange(1, 300)
    source, target = (rng.randrange(len(data) - length) for _ in range(2))
    data[target : target + length] = data[source : source + length]
    files[0].write_bytes(data)


def truncate(files: list[Path], rng: random.Random) -> None:
    data = files[0].read_bytes()
    files[0].write_bytes(data[: rng.randrange(len(data))])


def lengthen(files: list[Path], rng: random.Random) -> None:
    files[0].write_bytes(files[0].read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def fill_with_garbage(files: list[Path], rng: random.Random) -> None:
    files[0].write_bytes(rng.randbytes(rng.choice([0, 1, 31, 32, 33, files[0].stat().st_size, 10_000])))


def swap(files: list[Path], rng: random.Random) -> None:
    aside = files[0].with_name("aside")
    files[0].rename(aside)
    files[1].rename(files[0])
    aside.rename(files[1])


def copy_over(files: list[Path], rng: random.Random) -> None:
    shutil.copyfile(files[0], files[1])


def join_halves(files: list[Path], rng: random.Random) -> None:
    first, second = files[0].read_bytes(), files[1].read_bytes()
    cut = rng.randrange(len(first))
    files[0].write_bytes(first[:cut] + second[cut:])


def rename_to_a_block_not_there(files: list[Path], rng: random.Random) -> None:
    block = rng.choice(blocks_of(FORM.fingerprint, text_of(1, 2, 3, 8)))
    files[0].rename(files[0].with_name(name_of(block)))


def remove(files: list[Path], rng: random.Random) -> None:
    files[0].unlink()


def bring_from_another_model(files: list[Path], rng: random.Random) -> None:
    form = LatentForm("cd" * 32, FORM.num_layers, FORM.width, FORM.dtype)
    text = rng.choice(TEXTS)
    data = BlockFile(form).pack(blocks_of(form.fingerprint, text)[0], latents_of(text, form)[:, :64])
    files[0].write_bytes(data)


DAMAGES: tuple[Callable[[list[Path], random.Random], None], ...] = (
    flip_bit,
    overwrite_part,
    move_part,
    truncate,
    lengthen,
    fill_with_garbage,
    swap,
    copy_over,
    join_halves,
    rename_to_a_block_not_there,
    remove,
    bring_from_another_model,
)


def test_a_thousand_random_damages_never_give_a_wrong_latent(tmp_path: Path) -> None:
    rng = random.Random(0)
    for turn in range(1000):
        cache = cache_of("disk", tmp_path)
        learn(cache, *TEXTS)
        files = block_files(tmp_path)
        assert len(files) == NUM_BLOCKS
        before = {file: file.read_bytes() for file in files}
        DAMAGES[turn % len(DAMAGES)](rng.sample(files, 2), rng)
        changed = {file for file in files if not file.exists() or file.read_bytes() != before[file]}
        for text in (*TEXTS, text_of(1, 2, 3, 8)):
            path = [name_of(block) for block in blocks_of(FORM.fingerprint, text)]
            good = [file.name for file in files if file not in changed]
            first_bad = next((depth for depth, name in enumerate(path) if name not in good), len(path))
            assert true_blocks(cache, text) == first_bad
        # What lies behind a block that is gone was not looked at, and is not known to be damaged.
        for file in set(block_files(tmp_path)) - (set(files) - changed):
            file.unlink()
        learn(cache, *TEXTS)
        assert [true_blocks(cache, text) for text in TEXTS] == [3, 4, 2]


def test_every_single_byte_of_a_file_is_under_guard(tmp_path: Path) -> None:
    block = blocks_of(FORM.fingerprint, TEXTS[0])[0]
    file = BlockFile(FORM)
    data = file.pack(block, latents_of(TEXTS[0])[:, :64])
    assert file.unpack(block, data) is not None
    for place in range(len(data)):
        data[place] ^= 0x10
        assert file.unpack(block, data) is None, f"byte {place} of {len(data)}"
        data[place] ^= 0x10


def test_a_damaged_file_is_removed_and_stored_anew(tmp_path: Path) -> None:
    cache = cache_of("disk", tmp_path)
    learn(cache, text_of(1))
    (file,) = block_files(tmp_path)
    truncate([file], random.Random(0))
    assert true_blocks(cache, text_of(1)) == 0 and not file.exists()
    learn(cache, text_of(1))
    assert true_blocks(cache_of("disk", tmp_path), text_of(1)) == 1
    assert cache.statistics()["disk"] == {"hits": 0, "stored": 2, "evicted": 0, "damaged": 1}


@pytest.mark.parametrize("text", [text_of(2), text_of(1, 1)], ids=["another text", "another beginning"])
def test_a_whole_file_under_the_name_of_another_block_is_no_hit(text: list[int], tmp_path: Path) -> None:
    """As two texts with the same hash would look."""
    cache = cache_of("disk", tmp_path)
    learn(cache, text_of(1))
    (file,) = block_files(tmp_path)
    target = blocks_of(FORM.fingerprint, text)[-1]
    shutil.copyfile(file, file.with_name(name_of(target)))
    assert true_blocks(cache, text) == len(text) // 64 - 1
