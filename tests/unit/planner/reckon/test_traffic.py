"""Bytes of a step against sums over ranks, by hand, and against the constants of the dispatchers."""

from itertools import pairwise

import pytest
from moe_comm.control import HEADER_SIZE
from moe_comm.two_hop import DEFAULT_CHUNKS
from moe_comm.wire.tile import TILE as COMM_TILE

from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.planner.reckon.exchange import Spread
from moe_runtime.planner.reckon.imbalance import largest_deviate, rank_imbalance
from moe_runtime.planner.reckon.traffic import Sent, domain_ranks, layer_traffic, ring, step_traffic
from moe_runtime.planner.reckon.wire import (
    CHUNKS,
    HEADER_WORDS,
    TILE,
    RowFormat,
    dispatcher_kind,
    record_bytes,
    wire_of,
)

V3 = "configs/run/v3_671b.yaml"


def test_constants_of_the_wire_are_the_dispatchers_own():
    assert (HEADER_WORDS, CHUNKS, TILE) == (HEADER_SIZE, DEFAULT_CHUNKS, COMM_TILE)


@pytest.mark.parametrize(
    ("fields", "expected"), [([(3, 2)], 6), ([(3, 1), (1, 4)], 8), ([(128, 1), (1, 4), (2, 2), (2, 4)], 144)]
)
def test_a_record_is_laid_out_as_a_struct(fields, expected):
    assert record_bytes(fields) == expected


def test_a_row_of_v3_by_hand():
    form = RowFormat("two_hop", "fp8_pow2", 7168, 8, 256)
    # 7,168 codes and 56 exponents; 8 ids of 2 bytes and 8 weights of 4; all are at their multiples already.
    assert form.record("dispatch").size == 7168 + 56 + 16 + 32
    assert form.record("combine").size == 2 * 7168
    assert form.record("combine_backward").size == 7168 + 56
    assert form.record("dispatch_backward").size == 2 * 7168 + 32


def test_a_layer_of_v3_by_hand():
    config = load_config(V3, ["precision=fp8"])
    spread = Spread(nodes=4.0, ranks=7.5, num_nodes=8, num_ranks=64, choices=8)
    sent = layer_traffic(config, 64, 8, 4096, spread)
    # Of 4 nodes one in 8 is the token's own; of 7.5 ranks one in 8 is the one that it arrives at.
    assert sent["dispatch"].network == 4096 * 4.0 * 7 / 8 * 7272
    assert sent["combine"].fast == 4096 * 7.5 * 7 / 8 * 14336
    assert sent["counts"] == Sent(fast=7 * 8 * (8 + 64 + 8), network=56 * 8 * (8 + 64 + 8))


def test_wire_and_dispatcher_are_what_auto_means():
    assert wire_of(load_config(V3, ["precision=bf16"])) == "auto"
    assert wire_of(load_config(V3, ["precision=fp8"])) == "fp8_pow2"
    assert wire_of(load_config(V3, ["precision=fp8", "fp8.keep_high=[moe.experts]"])) == "auto"
    model = load_config(V3).model
    assert dispatcher_kind(model, "auto", 64, 8) == "two_hop"
    assert dispatcher_kind(model, "auto", 64, 64) == "alltoall", "one node has no second hop"
    assert dispatcher_kind(model, "auto", 128, 8) == "alltoall", "8 groups do not cover 16 nodes"
    assert dispatcher_kind(model, "auto", 1, 8) is None


@pytest.mark.parametrize("schedule", ["dualpipe", "1f1b", "zbv"])
def test_every_boundary_is_crossed_once_each_way(schedule):
    config = load_config(V3, ["precision=bf16", f"layout.schedule={schedule}"])
    layout = check_layout(config)
    sent = sum((step_traffic(config, layout, rank, 8).pipeline for rank in range(16)), Sent())
    crossings = sum(a != b for way in layout.placement for a, b in pairwise(way)) / len(layout.placement)
    boundary = 4096 * 7168 * 2
    assert sent.fast == 0, "the next stage is 128 ranks away"
    assert sent.network == layout.num_microbatches * crossings * 2 * boundary


def test_neighbouring_stages_may_share_a_node():
    config = load_config(
        "configs/run/quickstart.yaml", ["layout.pp=2", "layout.dp=2", "layout.ep=2", "layout.schedule=1f1b"]
    )
    layout = check_layout(config)
    near, far = (step_traffic(config, layout, 0, per_node).pipeline for per_node in (4, 2))
    assert near.network == 0 and far.fast == 0 and near.fast == far.network > 0


def test_a_sum_over_nodes_leaves_each_by_all_its_ranks():
    assert ring(800.0, 8, 8) == Sent(fast=700.0)
    assert ring(800.0, 16, 8) == Sent(fast=750.0 * 7 / 8, network=750.0 / 8)
    assert ring(800.0, 4, 1) == Sent(network=600.0)
    assert ring(800.0, 1, 1) == Sent()


def test_groups_fill_as_much_of_a_domain_as_they_can():
    assert [domain_ranks(72, ep) for ep in (1, 8, 16, 64, 128)] == [72, 72, 64, 64, 64]
    assert [domain_ranks(8, ep) for ep in (4, 8, 64)] == [8, 8, 8]


def test_the_fullest_of_normal_deviates():
    # Tabulated: 2 have 1 / sqrt(pi), 10 have 1.5388.
    assert largest_deviate(2) == pytest.approx(0.5641896, abs=1e-5)
    assert largest_deviate(10) == pytest.approx(1.5387527, abs=1e-5)


def test_ranks_of_one_expert_are_as_unequal_as_experts_and_of_more_less():
    model = load_config(V3).model
    assert rank_imbalance(model, 256, 0.5) == pytest.approx(1.5)
    assert 1.15 < rank_imbalance(model, 64, 0.5) < 1.25
    assert rank_imbalance(model, 1, 0.5) == 1.0
