"""Ranks agree on one clock, and rank 0 hears some of them one after another."""

import time
from unittest.mock import patch

import torch.distributed as dist

from moe_runtime.parallel import clock_sync
from moe_runtime.parallel.peers import Peers
from tests.ranks import run_ranks


class _ElsewhereId:
    """A boot id as another machine would have it."""

    def exists(self) -> bool:
        return False


def _ahead(rank: int, world_size: int, shift_s: float) -> tuple[float, float]:
    peers = Peers(rank, world_size, dist.group.WORLD)
    same = clock_sync.clock_ahead_s(peers, (0, 1, 2))
    own = time.perf_counter
    with (
        patch.object(clock_sync, "_BOOT", _ElsewhereId()),
        patch.object(clock_sync.time, "perf_counter", lambda: own() + rank * shift_s),
    ):
        return same, clock_sync.clock_ahead_s(peers, (0, 1, 2))


def test_a_clock_that_is_ahead_is_found_out_and_one_machine_has_one_clock() -> None:
    found = run_ranks(_ahead, 4, 1000.0)
    assert [same for same, _ in found] == [0.0] * 4
    for rank, expected in ((0, 0.0), (1, 1000.0), (2, 2000.0), (3, 0.0)):  # rank 3 did not ask
        assert abs(found[rank][1] - expected) < 0.2


def _hears(rank: int, world_size: int) -> tuple[dict, object]:
    peers = Peers(rank, world_size, dist.group.WORLD)
    heard = peers.first_hears({"rank": rank, "text": "ä" * rank}, (0, 2))
    return heard, peers.first_says([rank, "x" * 1000])


def test_rank_0_hears_who_is_asked_and_all_hear_rank_0() -> None:
    found = run_ranks(_hears, 3)
    assert found[0][0] == {0: {"rank": 0, "text": ""}, 2: {"rank": 2, "text": "ää"}}
    assert found[1][0] == found[2][0] == {}
    assert all(said == [0, "x" * 1000] for _, said in found)
