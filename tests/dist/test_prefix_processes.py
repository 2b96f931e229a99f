"""Several processes over one folder of the prefix cache, and writers that are killed."""

import multiprocessing
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from moe_runtime.generate.prefix_folder import FOLDER
from tests.ranks import run_ranks
from tests.unit.generate.prefix_samples import BLOCK_BYTES, block_files, cache_of, learn, text_of, true_blocks

BLOCKS_A_TEXT = 3


def bytes_in(folder: Path) -> int:
    """All files of the cache, those being written too; one that goes meanwhile does not count."""
    total = 0
    for file in (folder / FOLDER).iterdir():
        try:
            total += file.stat().st_size
        except FileNotFoundError:
            continue
    return total


def _store_at_once(rank: int, world_size: int, folder: str, num_blocks: int) -> tuple[int, int]:
    """Store and find texts, half of them the other rank's too; gives (most bytes seen, blocks found)."""
    cache = cache_of("disk", Path(folder), num_blocks)
    rng = random.Random(rank)
    most = found = 0
    dist.barrier()
    for _ in range(40):
        word = rng.choice([rng.randrange(4), 100 * (1 + rank) + rng.randrange(20)])
        learn(cache, text_of(word, 1, 2))
        most = max(most, bytes_in(Path(folder)))
        found += true_blocks(cache, text_of(rng.randrange(4), 1, 2))
    dist.barrier()
    return most, found


def test_two_writers_keep_the_bound_and_read_nothing_wrong(tmp_path: Path) -> None:
    num_blocks = 8
    seen = run_ranks(_store_at_once, 2, str(tmp_path), num_blocks)
    bound = num_blocks * BLOCK_BYTES["disk"]
    # A rank looks right after it made room: too much is at most what the other has just written.
    assert max(most for most, _ in seen) <= bound + BLOCKS_A_TEXT * BLOCK_BYTES["disk"]
    assert min(found for _, found in seen) > 0
    assert 0 < bytes_in(tmp_path) <= bound
    assert len(block_files(tmp_path)) == len(list((tmp_path / FOLDER).iterdir())), "nothing half-written"


def _store_for_ever(folder: str, seed: int, began: Connection) -> None:
    cache = cache_of("disk", Path(folder), num_blocks=12)
    began.send(True)
    rng = random.Random(seed)
    while True:
        learn(cache, text_of(rng.randrange(8), rng.randrange(3), 2))


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_writers_killed_at_any_time_leave_nothing_that_is_read_wrong(kills: int, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    rng = random.Random(0)
    found = 0
    for seed in range(kills):
        hears, speaks = context.Pipe(duplex=False)
        writer = context.Process(target=_store_for_ever, args=(str(tmp_path), seed, speaks), daemon=True)
        writer.start()
        assert hears.recv()
        time.sleep(rng.uniform(0.0, 0.03))
        writer.kill()
        writer.join()
        reader = cache_of("disk", tmp_path)
        found += sum(true_blocks(reader, text_of(a, b, 2)) for a in range(8) for b in range(3))
        assert reader.statistics()["disk"]["damaged"] == 0
    assert found > 0
    learn(cache_of("disk", tmp_path, num_blocks=12), text_of(99))
    assert bytes_in(tmp_path) <= 12 * BLOCK_BYTES["disk"]
