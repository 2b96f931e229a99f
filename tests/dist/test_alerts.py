"""Each alert by a fault made on purpose, in real runs; and what it then does."""

from pathlib import Path

import pytest

from tests.dist.guard_world import (
    LAYOUTS,
    Outcome,
    Trial,
    events,
    records,
    smallest_batch,
    try_all,
    write,
)

QUIET = ("train.checkpoint_every=0", "guard.max_skips=9")
TRIALS = (
    Trial(
        "dead",
        (
            *QUIET,
            "alerts.dead_expert={threshold: 6, action: [checkpoint, stop]}",
            "metrics.heatmap_every=1",
        ),
        inject=("dead_expert:rank0:step3",),
    ),
    Trial(
        "runaway",
        (*QUIET, "alerts.bias_runaway={threshold: 0.45, patience: 3, action: checkpoint}"),
        inject=("bias_runaway:rank0:step2:8",),
    ),
    Trial(
        "overload",
        (*QUIET, "metrics.window=2", "alerts.violation={threshold: 2.0, patience: 4, action: wandb}"),
        inject=("overload:rank1:step4",),
    ),
    Trial(
        "noise",
        (
            "guard.spike_window=8",
            "guard.spike_max=1",
            "alerts.spike={threshold: 4, action: roll_back}",
            "optim.peak_lr=1e-2",
            "train.total_steps=24",
            "train.checkpoint_every=10",
        ),
        inject=("noise:rank0:step21", "noise:rank1:step21"),
    ),
    Trial("nan", QUIET, inject=("nan:rank1:step3:grad",)),
)
Runs = tuple[str, dict[str, list[Outcome]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    config = write(tmp_path_factory.mktemp("alerts"), LAYOUTS[2], train__total_steps=12)
    return config, try_all(2, config, TRIALS)


def test_a_dead_expert_is_named_and_the_run_saved_and_stopped(runs: Runs) -> None:
    config, outcomes = runs
    (event,) = events(config, "dead", "alert")
    assert (event["alert"], event["where"], event["experts"]) == (
        "dead_expert",
        ["layers.1"],
        {"layers.1": [0]},
    )
    (error,) = {outcome.error for outcome in outcomes["dead"]}
    assert error is not None and f"step {event['step']}: alert dead_expert" in error
    lines = records(config, "dead")
    assert lines[-1]["step"] == event["step"], "it ended there"
    last = [[line["step"], line["routing"]["starved_steps"]["max"]] for line in lines]
    assert event["last"] == last[-20:] and event["value"] == 7 == last[-1][1]
    (saved,) = events(config, "dead", "checkpoint")
    assert saved["step"] == event["step"]


def test_a_bias_that_runs_away_makes_a_checkpoint(runs: Runs) -> None:
    config, outcomes = runs
    assert {outcome.error for outcome in outcomes["runaway"]} == {None}
    (event,) = events(config, "runaway", "alert")
    assert event["alert"] == "bias_runaway" and event["where"] == ["layers.1"]
    assert [step for step, value in event["last"] if value > 0.45] == [
        event["step"] - 2 + n for n in range(3)
    ]
    assert event["step"] in [saved["step"] for saved in events(config, "runaway", "checkpoint")]


def test_an_overloaded_expert_is_a_violation_that_nothing_evens_out(runs: Runs) -> None:
    config, _ = runs
    (event,) = events(config, "overload", "alert")
    assert (event["alert"], event["where"]) == ("violation", ["layers.1"])
    (warning,) = events(config, "overload", "warning")
    assert "metrics.wandb is off" in warning["message"]


def test_a_spike_rolls_back_past_its_data(runs: Runs) -> None:
    config, outcomes = runs
    assert {outcome.error for outcome in outcomes["noise"]} == {None}
    (event,), (back,) = events(config, "noise", "alert"), events(config, "noise", "roll_back")
    assert (event["alert"], event["step"]) == ("spike", 21)
    assert (back["step"], back["to_step"]) == (21, 20)
    assert [line["step"] for line in records(config, "noise")] == list(range(1, 25))


def test_gradients_that_are_not_finite_are_counted_and_told(runs: Runs) -> None:
    config, _ = runs
    (event,) = events(config, "nan", "alert")
    assert (event["alert"], event["step"], event["value"]) == ("nonfinite", 3, 1.0)
    assert [line["nonfinite"] for line in records(config, "nan")[1:4]] == [0, 1, 0]
    (over,) = events(config, "nan", "alert_over")
    assert (over["alert"], over["step"]) == ("nonfinite", 4)


@pytest.mark.slow
def test_a_run_that_an_alert_stopped_goes_on_without_being_stopped_again(runs: Runs) -> None:
    config, _ = runs
    again = try_all(2, config, (Trial("dead", TRIALS[0].overrides),))["dead"]
    assert {outcome.error for outcome in again} == {None}
    assert len(events(config, "dead", "alert")) == 1, "it is known to be raised"
    assert records(config, "dead")[-1]["step"] == 12


@pytest.mark.slow
def test_weights_cast_with_scales_that_are_too_small(tmp_path: Path) -> None:
    config = write(tmp_path, {"dp": 2, "ep": 2}, precision="fp8", train__total_steps=10)
    sampled = ("metrics.numerics_every=2", "alerts.saturation.action=stop")
    trials = (Trial("clean", sampled), Trial("cut", sampled, inject=("saturate:rank1:step3",)))
    outcomes = try_all(2, config, trials)
    assert events(config, "clean", "alert") == []
    kinds = {event["alert"]: event for event in events(config, "cut", "alert")}
    event = kinds["saturation"]
    assert event["where"] == ["weight"] and event["step"] == 6, "two samples in a row: steps 4 and 6"
    assert "alert saturation" in (outcomes["cut"][0].error or "")
    clean, cut = (records(config, name)[3] for name in ("clean", "cut"))
    assert clean["fp8"]["weight"]["saturation"] < 0.01 < 0.1 < cut["fp8"]["weight"]["saturation"]
    assert clean["fp8_error"] < 0.05 < cut["fp8_error"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_no_alert_in_five_hundred_sound_steps(ranks: int, tmp_path: Path) -> None:
    """With the thresholds as they are by default: a young router's unevenness is none of an alert's business."""
    batch = {"batch__global_batch_size": 8, "batch__micro_batch_size": 8 // smallest_batch(ranks)}
    config = write(tmp_path, LAYOUTS[ranks], train__total_steps=500, **batch)
    outcomes = try_all(ranks, config, (Trial("sound", ("train.checkpoint_every=0",)),), timeout_s=1200.0)
    assert {outcome.error for outcome in outcomes["sound"]} == {None}
    lines = records(config, "sound")
    assert len(lines) == 500 and events(config, "sound", "alert") == []
    assert any(line["routing"]["dead_experts"]["max"] > 0 for line in lines), (
        "there was something to be calm about"
    )
    assert lines[-1]["spike_z"] is not None and lines[-1]["routing"]["unchecked_violation"]


@pytest.mark.slow
def test_no_alert_in_two_hundred_sound_steps_in_fp8(tmp_path: Path) -> None:
    config = write(tmp_path, {}, precision="fp8", train__total_steps=200, batch__global_batch_size=2)
    try_all(
        1,
        config,
        (Trial("sound", ("train.checkpoint_every=0", "metrics.numerics_every=2")),),
        timeout_s=1200.0,
    )
    lines = records(config, "sound")
    assert len(lines) == 200 and events(config, "sound", "alert") == []
    assert sum("fp8_error" in line for line in lines) == 100
