"""Figures of routing, from routers whose choices are known."""

import pytest
import torch

from moe_runtime.cli.ablate.measure import RouterWatch, nodes_reached, routing_figures
from moe_runtime.model.router import Router

EXPERTS, TOP_K = 16, 4


def _router(bias: list[float]) -> Router:
    router = Router(8, EXPERTS, TOP_K)
    torch.nn.init.zeros_(router.weight)
    router.bias.copy_(torch.tensor(bias))
    return router


def _seen(*biases: list[float]) -> dict[str, float]:
    watches = []
    for bias in biases:
        router = _router(bias)
        watches.append(RouterWatch(router))
        for _ in range(3):
            router(torch.randn(2, 50, 8))
    return routing_figures(watches, EXPERTS)


def test_a_router_that_takes_four_experts_leaves_twelve_dead():
    found = _seen([1.0] * 4 + [0.0] * 12)
    assert found["violation_text"] == EXPERTS / TOP_K - 1
    assert found["dead_experts"] == found["starved_experts"] == 75.0
    assert found["nodes_reached"] == 1.0 and found["copies_between_nodes"] == 0.75


def test_the_worst_layer_gives_the_violation_and_all_layers_the_shares():
    spread = [1.0, 0.0, 0.0, 0.0] * 4
    found = _seen(spread, [1.0] * 4 + [0.0] * 12)
    assert found["nodes_reached"] == (4.0 + 1.0) / 2
    assert found["dead_experts"] == 75.0


def test_an_expert_below_a_tenth_is_starved_and_below_a_hundredth_dead():
    watch = RouterWatch(_router([0.0] * EXPERTS))
    watch.counts = torch.tensor([1000] * 14 + [50, 5])
    watch.nodes = watch.tokens = 1
    found = routing_figures([watch], EXPERTS)
    assert found["starved_experts"] == 2 / 16 * 100 and found["dead_experts"] == 1 / 16 * 100


def test_each_node_counts_once():
    ids = torch.tensor([[0, 1, 2, 3], [0, 4, 8, 12], [15, 14, 0, 1]])
    assert nodes_reached(ids, EXPERTS) == 1 + 4 + 2
    with pytest.raises(RuntimeError):
        nodes_reached(torch.tensor([[99]]), EXPERTS)
