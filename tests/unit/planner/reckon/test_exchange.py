"""How far a token goes, by reckoning and by the model's own router."""

import pytest
import torch

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.router import choose_experts
from moe_runtime.planner.reckon.exchange import exchange, uniform_spread

V3 = {"num_experts": 256, "num_groups": 8, "num_groups_kept": 4, "top_k": 8}
UNLIMITED = {"num_experts": 64, "num_groups": 1, "num_groups_kept": 1, "top_k": 6}


def _reached(ids: torch.Tensor, experts: int, places: int) -> float:
    hit = torch.zeros(ids.shape[0], places, dtype=torch.bool)
    return float(hit.scatter_(1, ids // (experts // places), True).sum(1).double().mean())


@pytest.mark.parametrize(("shape", "ep", "per_node"), [(V3, 64, 8), (V3, 32, 8), (UNLIMITED, 16, 2)])
def test_places_are_those_that_the_router_of_the_model_reaches(shape, ep, per_node):
    generator = torch.Generator().manual_seed(0)
    affinities = torch.randn(20_000, shape["num_experts"], generator=generator).sigmoid()
    bias = torch.zeros(shape["num_experts"])
    limits = shape["num_groups"], shape["num_groups_kept"]
    ids = choose_experts(affinities, bias, shape["top_k"], *limits)
    spread = uniform_spread(ModelConfig.model_construct(**shape), ep, per_node)
    # Affinities are uniform there and of another law here, on which the two best of a group depend a bit.
    assert spread.nodes == pytest.approx(_reached(ids, shape["num_experts"], ep // per_node), rel=0.006)
    assert spread.ranks == pytest.approx(_reached(ids, shape["num_experts"], ep), rel=0.006)


def test_v3_reaches_nearly_all_nodes_that_it_may():
    spread = uniform_spread(ModelConfig.model_construct(**V3), 64, 8)
    assert 3.93 < spread.nodes < 3.98, "drawing experts from kept groups at random would give 3.63"


def test_rows_straight_to_ranks_are_split_by_distance():
    spread = uniform_spread(ModelConfig.model_construct(**UNLIMITED), 16, 4)
    sent = exchange(spread, 100, 2.0, two_hop=False)
    # Of 15 other ranks 3 are near; of 6 choices 15 in 16 leave the rank.
    assert sent.fast_bytes == pytest.approx(100 * 2 * 6 * 3 / 16)
    assert sent.network_bytes == pytest.approx(100 * 2 * 6 * 12 / 16)
