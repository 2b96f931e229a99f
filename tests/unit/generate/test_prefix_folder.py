"""The folder of blocks: who may read it, what in it is ours, and that no disk stops anybody."""

import json
import logging
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_runtime.generate.prefix_blocks import blocks_of
from moe_runtime.generate.prefix_cache import open_prefix_cache
from moe_runtime.generate.prefix_folder import FOLDER, PrefixFolder, name_of
from tests.file_limit import largest_file
from tests.unit.generate.prefix_samples import (
    BLOCK_BYTES,
    FORM,
    block_files,
    cache_of,
    latents_of,
    learn,
    text_of,
    true_blocks,
)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_folder_and_files_are_their_owners_alone(tmp_path: Path) -> None:
    learn(cache_of("disk", tmp_path / "a" / "b"), text_of(1))
    made = tmp_path / "a" / "b"
    assert mode_of(made) == mode_of(made / FOLDER) == 0o700
    assert {mode_of(file) for file in block_files(made)} == {0o600}


def test_a_folder_that_was_there_keeps_its_rights_and_ours_within_it_is_closed(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER).chmod(0o755)
    cache_of("disk", tmp_path)
    assert mode_of(tmp_path) == 0o755 and mode_of(tmp_path / FOLDER) == 0o700


def test_a_block_is_a_safetensors_file(tmp_path: Path) -> None:
    learn(cache_of("disk", tmp_path), text_of(1))
    (file,) = block_files(tmp_path)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "moe_runtime prefix block 1", "model": FORM.fingerprint}
        assert torch.equal(opened.get_tensor("latents"), latents_of(text_of(1))[:, :64])
        assert opened.get_tensor("tokens").tolist() == text_of(1)
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0 and json.loads(file.read_bytes()[8 : 8 + header])


def test_links_and_pipes_are_not_followed_and_other_files_not_touched(tmp_path: Path) -> None:
    cache = cache_of("disk", tmp_path, num_blocks=3)
    outside = tmp_path / "outside"
    for word in (1, 2, 3):
        learn(cache, text_of(word))
    link, pipe, folder = (
        tmp_path / FOLDER / name_of(blocks_of(FORM.fingerprint, text_of(word))[0]) for word in (1, 2, 3)
    )
    link.rename(outside)
    link.symlink_to(outside)  # a good block, if it were followed
    pipe.unlink()
    os.mkfifo(pipe)
    folder.unlink()
    folder.mkdir()
    (tmp_path / FOLDER / "notes.txt").write_text("mine")
    before = outside.read_bytes()
    assert [true_blocks(cache, text_of(word)) for word in (1, 2, 3)] == [0, 0, 0]
    for word in range(1, 9):
        learn(cache, text_of(word))
    assert outside.read_bytes() == before and (tmp_path / FOLDER / "notes.txt").read_text() == "mine"


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FOLDER).symlink_to(tmp_path / "elsewhere")
    learn(open_prefix_cache(FORM, 0, tmp_path, 10**6), text_of(1))
    assert len(caplog.records) == 1 and not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk_is_told_once_and_then_only_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of("disk", tmp_path)
    learn(cache, text_of(1))
    with largest_file(BLOCK_BYTES["disk"] // 2):
        learn(cache, text_of(1, 2), text_of(3), text_of(4))
    learn(cache, text_of(5))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "cannot be written" in caplog.text and "going on without storing" in caplog.text
    assert [true_blocks(cache, text_of(*words)) for words in ((1, 2), (3,), (5,))] == [1, 0, 0]
    assert len(list((tmp_path / FOLDER).iterdir())) == 1, "the part that was written is gone"


def test_a_folder_that_cannot_be_made_is_told_once_and_memory_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    cache = open_prefix_cache(FORM, 10**6, tmp_path / "file" / "cache", 10**6)
    learn(cache, text_of(1))
    assert true_blocks(cache, text_of(1)) == 1
    assert len(caplog.records) == 1 and "going on without it" in caplog.text


def test_a_folder_that_is_removed_meanwhile_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of("disk", tmp_path)
    learn(cache, text_of(1))
    block_files(tmp_path)[0].unlink()
    (tmp_path / FOLDER).rmdir()
    learn(cache, text_of(1), text_of(2))
    assert true_blocks(cache, text_of(1)) == 0
    assert len(caplog.records) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes wherever it likes")
def test_a_read_only_folder_still_serves(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learn(cache_of("disk", tmp_path), text_of(1))
    (tmp_path / FOLDER).chmod(0o500)
    cache = cache_of("disk", tmp_path)
    learn(cache, text_of(2), text_of(3))
    assert true_blocks(cache, text_of(1)) == 1
    assert len(caplog.records) == 1


def test_what_a_killed_writer_left_counts_and_goes_after_ten_minutes(tmp_path: Path) -> None:
    cache = cache_of("disk", tmp_path, num_blocks=3)
    learn(cache, text_of(1))
    left = tmp_path / FOLDER / ".tmp-1-ab"
    left.write_bytes(bytes(BLOCK_BYTES["disk"]))
    learn(cache, text_of(2), text_of(3))
    assert left.exists() and true_blocks(cache, text_of(1)) == 0
    os.utime(left, ns=(0, left.stat().st_mtime_ns - 601 * 10**9))
    learn(cache, text_of(4))
    assert not left.exists()


def test_files_of_other_names_are_not_ours(tmp_path: Path) -> None:
    learn(cache_of("disk", tmp_path), text_of(1))
    (block,) = block_files(tmp_path)
    for name in ("a.safetensors", ".tmp", "A" * 64 + ".safetensors", ".tmp-x-ab"):
        (tmp_path / FOLDER / name).write_text("x")
    assert [file.name for file in PrefixFolder(tmp_path).files()] == [block.name]
