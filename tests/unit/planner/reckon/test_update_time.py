"""Sums of gradients and gathered weights: bytes over links, and hops for every message."""

import pytest

from moe_runtime.config.layout import check_layout
from moe_runtime.config.load import load_config
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.states import BUCKET
from moe_runtime.planner.reckon.update_time import UpdateTime, update_time

# Of one pipeline rank, and of a model whose weights fit into one bucket.
SMALL = (
    "layout={pp: 1, dp: 16, ep: 1, schedule: single}",
    "batch={micro_batch_size: 1, global_batch_size: 32}",
)


def update(*overrides: str, latency_us: float = 0.0, bucket: int = BUCKET) -> UpdateTime:
    config = load_config("quickstart", overrides)
    cluster = load_cluster("h800")
    values = cluster.model_dump()
    values["fast"]["latency_us"] = values["network"]["latency_us"] = latency_us
    moved = type(cluster).model_validate(values)
    return update_time(Machine(config, check_layout(config), moved, "central"), bucket)


def test_hops_of_a_ring_are_paid_for_every_message() -> None:
    without, slow = update(*SMALL), update(*SMALL, latency_us=1000.0)
    assert slow.gradients - without.gradients == pytest.approx((15 + 15) * 1e-3)  # matrices and experts
    assert slow.parameters - without.parameters == pytest.approx((15 + 15) * 1e-3)


def test_smaller_buckets_are_more_messages_of_gradients_and_none_more_of_weights() -> None:
    whole, cut = update(*SMALL, latency_us=1000.0), update(*SMALL, latency_us=1000.0, bucket=2**17)
    rounds = (cut.gradients - whole.gradients) / 15e-3
    assert rounds == pytest.approx(round(rounds)) and rounds > 2
    assert cut.parameters == whole.parameters


def test_one_rank_sums_nothing() -> None:
    alone = update("layout={pp: 1, dp: 1, ep: 1, schedule: single}", SMALL[1], latency_us=1000.0)
    assert (alone.gradients, alone.parameters) == (0.0, 0.0)
    assert alone.update > 0


def test_small_moments_are_moved_in_less_time() -> None:
    assert update(*SMALL, "optim.moments=fp8").update < update(*SMALL, "optim.moments=fp32").update
