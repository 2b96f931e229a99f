"""The published run, planned: held against what DeepSeek reported and traced. None of it is an input.

2,048 H800, 14.8T tokens: 2.664M GPU hours (DSV3 table 1), which is 1,542 tokens/s/GPU; one overlapped pair of
four MoE layers 129.0 ms (github deepseek-ai/profile-data, train.json); the step by phases, ISCA 2025 table 4.
"""

from dataclasses import replace

import pytest

from moe_runtime.config.load import load_config
from moe_runtime.planner.hardware.cluster import Peaks
from moe_runtime.planner.hardware.load import load_cluster
from moe_runtime.planner.reckon.machine import Machine
from moe_runtime.planner.reckon.plan import Plan, plan
from moe_runtime.planner.reckon.plan_fields import plan_fields
from moe_runtime.planner.reckon.step import PHASES, reckon_step, run_program
from moe_runtime.planner.reckon.token_flops import model_flops_utilisation


@pytest.fixture(scope="module")
def published() -> Plan:
    return plan(load_config("v3_671b"), load_cluster("h800"))


def test_the_rate_is_within_a_tenth_of_the_published_one(published: Plan) -> None:
    assert published.here.tokens_per_s_per_gpu == pytest.approx(1542, rel=0.10)
    assert published.here.run.steady_gpu_hours == pytest.approx(2.664e6, rel=0.10)


def test_the_ends_of_all_ranges_lie_around_it(published: Plan) -> None:
    slow, fast = (published.worlds[world].tokens_per_s_per_gpu for world in ("slow", "fast"))
    assert slow < 1542 < fast


def test_a_pair_of_four_moe_layers_takes_as_long_as_in_the_published_trace(published: Plan) -> None:
    pair = published.here.step.times.pair(5, 10)  # any two stages in the middle
    assert pair.span == pytest.approx(0.129, rel=0.15)
    # The trace hides 96% of its exchanges.
    assert 1 - (pair.span - pair.computing) / pair.flying > 0.9


def test_parameters_and_operations_are_those_of_the_report(published: Plan) -> None:
    assert published.counts.total == pytest.approx(671.03e9, rel=1e-4)
    assert published.counts.active == pytest.approx(37e9, rel=0.02)
    # ISCA 2025 table 4: 385 TFLOP/s causal and 432 with full attention at 1,541.7 tokens/s/GPU.
    assert published.flops.total("causal") == pytest.approx(385e12 / 1541.7, rel=0.005)
    assert published.flops.total("full") == pytest.approx(432e12 / 1541.7, rel=0.005)


def test_published_mfu_follows_from_the_published_rate(published: Plan) -> None:
    shares = model_flops_utilisation(published.flops, 1541.7, Peaks(bf16=989, fp8=1979))["bf16_peak"]
    assert (shares["causal"], shares["full"]) == pytest.approx((0.3894, 0.4373), abs=0.003)


def test_phases_are_the_whole_step(published: Plan) -> None:
    step = published.here.step
    assert set(step.phases) == set(PHASES)
    assert sum(step.phases.values()) == pytest.approx(step.seconds)
    for rank in range(16):
        assert sum(step.phases_of(rank).values()) == pytest.approx(step.seconds)


def test_the_ramp_costs_more_than_full_steps_and_failures_more_than_that(published: Plan) -> None:
    run = published.here.run
    assert run.steady_gpu_hours < run.gpu_hours < run.gpu_hours_with_failures


def test_a_step_of_any_batch_lies_on_the_line_that_the_ramp_is_reckoned_by(published: Plan) -> None:
    layout = published.layout
    machine = Machine(published.config, layout, published.cluster, "central")

    def seconds(num_microbatches: int) -> float:
        program = run_program(machine, num_microbatches)
        return reckon_step(machine, program).seconds

    first, last = layout.num_microbatches_start, layout.num_microbatches
    middle = (first + last) // 2
    line = seconds(first) + (seconds(last) - seconds(first)) * (middle - first) / (last - first)
    assert seconds(middle) == pytest.approx(line, rel=0.005)


def test_sensitivity_is_sorted_and_slower_ends_are_slower(published: Plan) -> None:
    widths = [one.width for one in published.sensitivity]
    assert widths == sorted(widths, reverse=True) and widths[0] > 0.01
    by_name = {one.figure: one for one in published.sensitivity}
    assert by_name["network.gbps"].low < 0 < by_name["network.gbps"].high
    assert by_name["kernels.launch_us"].high < 0 < by_name["kernels.launch_us"].low


def test_full_ranks_take_longer_in_experts_and_exchanges(published: Plan) -> None:
    uneven = plan(published.config, published.cluster, imbalance=1.3, with_sensitivity=False)
    assert uneven.here.step.seconds > 1.02 * published.here.step.seconds
    assert uneven.memory[1].activations > published.memory[1].activations


def test_a_plan_says_itself_in_plain_values(published: Plan) -> None:
    fields = plan_fields(published)
    assert list(fields)[:14] == [
        "params_total", "params_active", "flops_per_token", "step_s", "tokens_per_s_per_gpu", "gpu_hours",
        "cost_usd", "bubble_s", "bubble_fraction", "exposed_comm_s", "phases_s", "memory", "traffic",
        "sensitivity",
    ]  # fmt: skip
    assert fields["run"]["usual_pair"]["span_s"] == pytest.approx(0.129, rel=0.15)
    block = fields["run"]["moe_block_s"]
    assert set(block) == {"attend", "dispatch", "shared", "experts", "combine"}
    tokens = fields["run"]["tokens"]
    assert fields["gpu_hours"] == pytest.approx(tokens / fields["tokens_per_s_per_gpu"] / 3600)
    assert fields["cost_usd"] == pytest.approx(2.0 * fields["gpu_hours"])
    assert plan_fields(replace(published, world="slow"))["step_s"] == fields["worlds"]["slow"]["step_s"]
