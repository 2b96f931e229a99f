"""What routers' meters sum up, against sums written out token by token."""

import math

import pytest
import torch
from moe_comm.placement import Placement

from moe_runtime.config.schema import ModelConfig
from moe_runtime.model.router import Router, biased_affinities
from moe_runtime.model.router_meter import QUANTITIES, RouterMeter
from moe_runtime.model.transformer import Transformer
from moe_runtime.parallel.router_meters import RouterMeters
from tests.unit.checkpoint.models import CONFIG

EXPERTS, TOP_K, HIDDEN = 12, 3, 16


def router(groups: int = 1, kept: int = 1) -> Router:
    generator = torch.Generator().manual_seed(groups)
    made = Router(HIDDEN, EXPERTS, TOP_K, groups, kept)
    with torch.no_grad():
        made.weight.normal_(generator=generator)
        made.bias.normal_(std=0.3, generator=generator)
    return made


def plain_sums(made: Router, x: torch.Tensor, nodes: list[int]) -> list[float]:
    """The four sums, expert by expert, from the definitions."""
    found = [0.0] * 4
    for logits in (x.flatten(0, 1) @ made.weight.T).tolist():
        affinities = torch.tensor([logits]).sigmoid()
        biased = biased_affinities(affinities, made.bias, made.num_groups, made.num_groups_kept)[0].tolist()
        order = sorted(range(EXPERTS), key=lambda expert: biased[expert], reverse=True)
        found[0] += sum(logit**2 for logit in logits)
        found[1] += math.log(sum(math.exp(logit) for logit in logits)) ** 2
        found[2] += biased[order[TOP_K - 1]] - biased[order[TOP_K]]
        found[3] += len({nodes[expert] for expert in order[:TOP_K]})
    return found


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("per_node", [None, 1, 2])
def test_sums_are_those_of_every_token(groups: int, kept: int, per_node: int | None) -> None:
    made, x = router(groups, kept), torch.randn(2, 20, HIDDEN, generator=torch.Generator().manual_seed(7))
    placement = Placement(EXPERTS, 4, 0, per_node)
    nodes = [placement.node_of(expert) for expert in range(EXPERTS)]
    sums, spent = torch.zeros(len(QUANTITIES), dtype=torch.float64), list[float]()
    made.meter = RouterMeter(sums, torch.tensor(nodes) if max(nodes) else None, spent)
    made(x)
    made(x[:1])  # a second microbatch
    expected = [
        a + b for a, b in zip(plain_sums(made, x, nodes), plain_sums(made, x[:1], nodes), strict=True)
    ]
    if per_node is None:
        expected[3], tokens = 0.0, made.meter.tokens
        assert tokens == 60
    assert sums.tolist() == pytest.approx(expected, rel=1e-5)  # FP32 sums of 60 tokens
    assert len(spent) == 2 and min(spent) > 0


def test_measuring_changes_nothing_that_is_routed() -> None:
    plain, measured = router(4, 2), router(4, 2)
    measured.meter = RouterMeter(torch.zeros(4, dtype=torch.float64), None, [])
    x = torch.randn(2, 8, HIDDEN, generator=torch.Generator().manual_seed(3), requires_grad=True)
    for left, right in zip(plain(x), measured(x), strict=True):
        assert torch.equal(left, right)


def test_a_forward_without_gradients_counts_for_nothing() -> None:
    made, sums = router(), torch.zeros(4, dtype=torch.float64)
    made.meter = RouterMeter(sums, None, [])
    with torch.no_grad():
        made(torch.randn(1, 4, HIDDEN))
    assert not sums.any()


def test_every_router_of_the_chunks_has_a_row_of_its_own() -> None:
    config: ModelConfig = CONFIG.model
    chunk = Transformer(config)
    chunk.init_weights(1)
    meters = RouterMeters([chunk], Placement(config.num_experts), torch.device("cpu"))
    assert list(meters.layers) == [name for name, _ in chunk.moe_layers()]
    length = 9 + config.mtp_depth
    chunk.losses(torch.randint(0, config.vocab_size, (2, length)))
    sums = meters.sums()
    tokens = 2 * (length - 1 - config.mtp_depth)
    assert sums[:, QUANTITIES.index("nodes")].tolist() == [tokens] * len(meters.layers)
    assert len(set(sums[:, 0].tolist())) == len(meters.layers) and meters.take_seconds() > 0
    meters.clear()
    assert not meters.sums().any() and meters.take_seconds() == 0
