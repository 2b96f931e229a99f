"""Ranks that were given different configs refuse together, and say which keys differ."""

import time

import torch.distributed as dist

from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.parallel.peers import Peers
from moe_runtime.train.same_config import check_same_config
from tests.ranks import run_ranks


def _said(rank: int, world_size: int) -> tuple[str, float]:
    config = load_config("quickstart", ["seed=5", "train.total_steps=7"] if rank == 1 else [])
    begin = time.monotonic()
    try:
        check_same_config(config, Peers(rank, world_size, dist.group.WORLD))
    except ConfigError as error:
        return str(error), time.monotonic() - begin
    return "", 0.0


def test_one_rank_with_another_seed_is_told_by_all_with_both_values() -> None:
    seed = load_config("quickstart").seed
    for said, seconds in run_ranks(_said, 3):
        assert said.startswith(f"ranks [1] have another config than rank 0: seed: expected {seed}, got 5; ")
        assert "train.total_steps: expected" in said and said.endswith("start all with the same command")
        assert seconds < 5 * 5  # the matrix: 5 s
