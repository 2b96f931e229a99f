"""Nodes that a study counts from routing are the copies that the dispatcher counts when it sends."""

import pytest
import torch
from moe_comm.factory import open_dispatcher
from moe_comm.placement import Placement

from moe_runtime.cli.ablate.measure import NODES, nodes_reached
from moe_runtime.model.router import choose_experts
from tests.ranks import run_ranks

EXPERTS, TOKENS, TOP_K = 16, 64, 4


def _ids(rank: int, kept: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    affinities = torch.rand(TOKENS, EXPERTS, generator=generator)
    return choose_experts(affinities, torch.zeros(EXPERTS), TOP_K, NODES, kept)


def _sent(rank: int, world: int) -> list[tuple[int, int]]:
    """Rows sent to other nodes, and stayed at home, with the group limit and without."""
    found = []
    for kept in (2, NODES):
        placement = Placement(EXPERTS, world, rank, ranks_per_node=1)
        dispatcher = open_dispatcher("two_hop", placement)
        ids = _ids(rank, kept)
        dispatcher.dispatch(torch.randn(TOKENS, 8), torch.rand(TOKENS, TOP_K), ids).wait()
        traffic = dispatcher.traffic.snapshot()
        at_home = (ids // (EXPERTS // NODES) == rank).any(dim=1).sum()
        assert traffic.rows_inter == nodes_reached(ids, EXPERTS) - int(at_home)
        found.append((traffic.rows_inter, int(at_home)))
    return found


@pytest.mark.slow
def test_nodes_reached_is_what_the_dispatcher_sends():
    limited, free = (sum(rows for rows, _ in pair) for pair in zip(*run_ranks(_sent, NODES), strict=True))
    assert 0 < limited < free
