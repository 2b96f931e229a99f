"""The record of a step: the same on every rank, in every layout, whatever is computed again, by one reduction."""

from pathlib import Path
from typing import Any

import pytest

from moe_runtime.metrics.line import paths, to_line
from tests.dist.guard_world import LAYOUTS, smallest_batch, write
from tests.dist.meter_world import Records, steps_of
from tests.ranks import run_ranks

STEPS = 3
# A learning rate of nothing: layouts round differently, and what they learn from it would grow apart.
PLAIN = ("optim.peak_lr=1e-7", "metrics.heatmap_every=1")
TRIALS = (
    ("name=plain", *PLAIN),
    ("name=twice", *PLAIN, "guard.replay_every=1"),
    ("name=again", *PLAIN, "recompute.norm=true", "recompute.swiglu=true", "recompute.mla_up=true"),
    ("name=nodes", *PLAIN, "layout.ranks_per_node=1", "metrics.layers_every=2", "metrics.peak_tflops=0.085"),
)
OF_ROUTING = (
    "max_violation",
    "worst_layer",
    "routing",
    "layers",
    "epoch",
    "skipped_steps",
    "flops_per_token",
)

Seen = list[list[tuple[Records, list[int]]]]  # by rank, by trial


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Seen]:
    """What every rank of a world of one and of four saw."""
    found = {}
    for ranks in (1, 4):
        folder = tmp_path_factory.mktemp(f"meters{ranks}")
        config = write(folder, LAYOUTS[ranks], batch__global_batch_size=smallest_batch(4))
        found[ranks] = run_ranks(steps_of, ranks, config, TRIALS if ranks == 4 else TRIALS[:1], STEPS)
    return found


def routing_of(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers that no layout may change, flat."""
    return dict(paths({key: record[key] for key in OF_ROUTING}))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        if isinstance(value, float):
            assert found[path] == pytest.approx(value, rel=1e-5, abs=1e-7), path  # order of FP32 sums
        else:
            assert found[path] == value, path


def test_four_ranks_under_dualpipe_measure_what_one_process_does(seen: dict[int, Seen]) -> None:
    (one, _), (four, _) = seen[1][0][0], seen[4][0][0]
    for found, expected in zip(four, one, strict=True):
        assert_same(routing_of(found), routing_of(expected))
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_every_schedule_measures_what_one_process_does(tmp_path: Path) -> None:
    deep = (*PLAIN, "model.num_layers=5", "model.num_dense_layers=1")
    layouts = (
        "schedule: 1f1b, pp: 4, dp: 1, ep: 1",
        "schedule: 1f1b, pp: 2, dp: 2, ep: 2, ranks_per_node: 2",
        "schedule: zb1p, pp: 2, dp: 2, ep: 1",
        "schedule: interleaved, chunks: 2, pp: 2, dp: 2, ep: 2",
        "schedule: zbv, pp: 2, dp: 2, ep: 2",
        "schedule: dualpipev, pp: 2, dp: 2, ep: 1",
        "schedule: dualpipe, pp: 4, dp: 1, ep: 1",
        "schedule: gpipe, pp: 1, dp: 4, ep: 4",
    )
    trials = tuple(
        (f"name=layout{number}", *deep, f"layout={{{layout}}}") for number, layout in enumerate(layouts)
    )
    config = write(tmp_path, {}, batch__global_batch_size=smallest_batch(4))
    ((whole, _),) = run_ranks(steps_of, 1, config, (("name=one", *deep),), STEPS)[0]
    by_layout = run_ranks(steps_of, 4, config, trials, STEPS)[0]
    for layout, (records, counts) in zip(layouts, by_layout, strict=True):
        assert counts == [1] * STEPS, layout
        for found, expected in zip(records, whole, strict=True):
            assert_same(routing_of(found), routing_of(expected))


def test_every_rank_holds_the_same_record(seen: dict[int, Seen]) -> None:
    for trial in range(len(TRIALS)):
        first, *others = [rank[trial][0] for rank in seen[4]]
        assert all(other == first for other in others)


def test_a_record_takes_one_reduction(seen: dict[int, Seen]) -> None:
    assert [trial[1] for trial in seen[4][2]] == [[1] * STEPS] * len(TRIALS)


@pytest.mark.parametrize("trial", [1, 2])
def test_what_is_computed_again_is_not_counted_again(seen: dict[int, Seen], trial: int) -> None:
    plain, again = seen[4][0][0][0], seen[4][0][trial][0]
    for found, expected in zip(again, plain, strict=True):
        assert_same(routing_of(found), routing_of(expected))


def test_a_token_reaches_the_nodes_that_hold_its_experts(seen: dict[int, Seen]) -> None:
    records = seen[4][0][3][0]
    assert [("layers" in to_line(record)) for record in records] == [False, True, False]
    for record in records:
        reached = record["routing"]["nodes_per_token"]
        assert 1.0 < reached["min"] <= reached["max"] < 2.0  # two nodes of one rank each
    assert all(record["routing"]["nodes_per_token"]["max"] == 1.0 for record in seen[4][0][0][0])


def test_the_record_of_a_step_has_what_is_promised(seen: dict[int, Seen]) -> None:
    line = to_line(seen[4][0][0][0][-1])
    times = ("step_s", "step_s_p50", "step_s_p99", "data_wait_s", "meters_s", "memory_peak_gb")
    assert all(line[key] > 0 for key in (*times, "tokens_per_s_rank", "exposed_comm_s", "flops_per_token"))
    assert line["step_s_p50"] <= line["step_s_p99"] and line["meters_s"] < line["step_s"]
    assert 0 <= line["bubble_fraction_ideal"] < 1 and 1 <= line["rank_load_ratio"] <= 2
    assert line["dispatch_gb_s_intra"] > 0 and "dispatch_gb_s_inter" not in line
    assert line["exposed_comm_s"] == pytest.approx(line["exposed_comm_fraction"] * line["step_s"])
    assert {"mfu", "alloc_retries", "spike_z"}.isdisjoint(line)  # no known peak, no GPU, no full window
    assert line["layers"].keys() == {"layers.1", "mtp.0.block"}


def test_a_peak_that_is_given_is_what_utilisation_is_a_share_of(seen: dict[int, Seen]) -> None:
    for record in seen[4][0][3][0]:
        expected = record["flops_per_token"] * record["tokens_per_s_rank"] / 85e9
        assert record["mfu"] == pytest.approx(expected) and 0 < record["mfu"] < 1
