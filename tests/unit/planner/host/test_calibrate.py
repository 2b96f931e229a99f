"""Calibration: what a run was made of is found again, and runs of other shapes are foretold."""

from dataclasses import replace

import pytest

from moe_runtime.cli.calibrate.make import FLOOR
from moe_runtime.config.load import load_config
from moe_runtime.errors import ConfigError
from moe_runtime.planner.hardware.cluster import Cluster
from moe_runtime.planner.hardware.save import cluster_text
from moe_runtime.planner.host.calibrate import Pair, calibrate, usual
from moe_runtime.planner.host.phases import phase_seconds, phase_shape
from moe_runtime.planner.host.step import host_step
from tests.unit.planner.host.machine import EXCHANGE, PROBES, made_up, run_of

# At the floor some bytes and operations are left, which calibration counts as fixed.
NEAR = pytest.approx


def pair(overrides: tuple[str, ...], cluster: Cluster) -> Pair:
    return Pair(run_of(overrides, cluster, True), run_of(overrides, cluster, False))


@pytest.fixture(scope="module")
def found() -> Cluster:
    cluster = made_up()
    return calibrate(PROBES, pair(FLOOR, cluster), pair((), cluster))


def test_phases_cost_what_the_run_was_made_of(found: Cluster) -> None:
    cluster, config = made_up(), load_config("calibrate")
    assert cluster.host is not None and found.host is not None
    for phase in cluster.host.phases:
        wanted = phase_seconds(phase, config.model, phase_shape(config), cluster)
        got = phase_seconds(phase, config.model, phase_shape(config), found)
        # Weight gradients of shared and routed experts are measured as one, and parted by operations.
        assert got == NEAR(wanted, rel=0.05), phase
    assert found.host.exchange.fixed_us == NEAR(EXCHANGE.fixed_us, rel=0.02)
    assert found.host.exchange.ns_per_byte == NEAR(EXCHANGE.ns_per_byte, rel=0.02)
    assert found.host.message.ns_per_byte == NEAR(0.5)


@pytest.mark.parametrize(
    "overrides",
    [
        ("batch.seq_len=512",),
        ("model.hidden_size=384", "model.expert_ffn_size=512"),
        ("layout.pp=2", "layout.schedule=dualpipe"),
    ],
)
def test_other_shapes_and_layouts_follow(found: Cluster, overrides: tuple[str, ...]) -> None:
    config = load_config("calibrate", overrides)
    assert host_step(config, found).step_s == NEAR(host_step(config, made_up()).step_s, rel=0.03)


def test_the_file_loads_as_the_same_cluster(found: Cluster) -> None:
    import yaml

    again = Cluster.model_validate(yaml.safe_load(cluster_text(found)))
    assert again.host is not None and found.host is not None
    assert again.host.phases["attend"].fixed_us == NEAR(found.host.phases["attend"].fixed_us, rel=1e-4)
    assert host_step(load_config("calibrate"), again).step_s == NEAR(
        host_step(load_config("calibrate"), found).step_s, rel=1e-3
    )


def test_runs_that_cannot_be_calibrated_on_are_refused() -> None:
    cluster = made_up()
    good = pair((), cluster)
    with pytest.raises(ConfigError, match=r"metrics\.trace_step"):
        calibrate(PROBES, Pair(replace(good.apart, trace=None), good.together), good)
    crowded = replace(good.apart, config=load_config("calibrate", ["layout.pp=2", "layout.schedule=1f1b"]))
    with pytest.raises(ConfigError, match="one for each core"):
        calibrate(PROBES, good, Pair(crowded, good.together))


def test_an_interrupted_phase_does_not_count() -> None:
    assert usual([1.0] * 9 + [50.0]) == 1.0
    assert usual([1.0, 2.0, 3.0]) == 2.0
