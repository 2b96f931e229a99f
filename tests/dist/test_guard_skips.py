"""A gradient that is not finite, and a loss that stands out, in real runs."""

from pathlib import Path

import pytest

from tests.dist.guard_world import (
    LAYOUTS,
    Outcome,
    Strike,
    Trial,
    digests,
    events,
    records,
    smallest_batch,
    try_all,
    write,
)

ROLLS_BACK = (
    "guard.spike_z=0.1",
    "guard.spike_window=8",
    "guard.spike_action=roll_back",
    "guard.spike_max=1",
    "guard.spike_skip_steps=1",
)
# A learning rate of nothing: what is left of the loss is how its batches differ, so one will stand out.
FLAT = ("optim.peak_lr=1e-6", "train.total_steps=12")
TRIALS = (
    Trial("nan", strikes=(Strike("nan", "grad", rank=1, step=3, phase="optimizer"),)),
    Trial("left_out", ("train.skip_updates=[3]", "guard.replay_every=1")),
    Trial(
        "diverged",
        ("guard.max_skips=2",),
        strikes=(Strike("inf", "grad", rank=1, step=2, phase="optimizer", times=4),),
    ),
)

Runs = tuple[str, dict[str, list[Outcome]]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    ranks = request.param
    size = {"train__total_steps": 4, "batch__global_batch_size": smallest_batch(ranks)}
    config = write(tmp_path_factory.mktemp("guards"), LAYOUTS[ranks], **size)
    return config, try_all(ranks, config, TRIALS)


def test_one_nan_on_one_rank_skips_the_step_and_is_named(runs: Runs) -> None:
    config, outcomes = runs
    assert {outcome.error for outcome in outcomes["nan"]} == {None}
    (event,) = events(config, "nan", "skipped")
    (hit,) = outcomes["nan"][1].hit
    assert event["step"] == 3 and event["in_row"] == 1
    (culprit,) = event["culprits"]
    assert culprit["rank"] == 1 and hit == f"{culprit['name']}[{culprit['first']}]"
    # The middle of a tensor: of eight experts the fifth, where rank 1 holds the upper four the seventh.
    assert culprit["name"].endswith(".moe.experts.gate_up")
    assert culprit["expert"] == (4 if len(outcomes["nan"]) == 2 else 6)
    assert [record["skipped"] for record in records(config, "nan")] == [False, False, True, False]


def test_a_skipped_step_is_that_of_a_clean_run_told_to_leave_it_out(runs: Runs) -> None:
    config, outcomes = runs
    assert {outcome.error for outcome in outcomes["left_out"]} == {None}
    assert digests(config, "nan") == digests(config, "left_out")
    assert not events(config, "left_out", "corruption"), "each step was run twice, to the same gradients"
    (event,) = events(config, "left_out", "skipped")
    assert event["step"] == 3 and "train.skip_updates" in event["message"]


def test_steps_skipped_in_a_row_end_the_run_on_all_ranks(runs: Runs) -> None:
    config, outcomes = runs
    (error,) = {outcome.error for outcome in outcomes["diverged"]}
    assert error is not None and "2 steps in a row" in error and "on rank 1: 1 infinite" in error
    assert [event["in_row"] for event in events(config, "diverged", "skipped")] == [1, 2]
    (stopped,) = events(config, "diverged", "stopped")
    assert stopped["message"] == error


@pytest.mark.slow
def test_fp8_and_stage_2_hide_nothing(tmp_path: Path) -> None:
    """An infinite weight under FP8 casts, whose sums of gradients are partitioned, without guards at rest."""
    config = write(tmp_path, {"dp": 2, "ep": 2, "zero_stage": 2}, precision="fp8")
    strike = Strike("inf", "param", rank=0, step=2, phase="data")
    trial = Trial("fp8", ("guard.max_skips=2", "guard.digest_every=0"), (strike,))
    outcomes = try_all(2, config, (trial,))["fp8"]
    (error,) = {outcome.error for outcome in outcomes}
    assert error is not None and "2 steps in a row" in error
    skipped = events(config, "fp8", "skipped")
    assert [event["step"] for event in skipped] == [2, 3]
    names = {culprit["name"] for culprit in skipped[0]["culprits"]}
    assert outcomes[0].hit[0].partition("[")[0] in names
    assert {culprit["rank"] for culprit in skipped[0]["culprits"]} == {None}


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_spike_rolls_back_and_goes_on_as_a_clean_run_without_that_data(ranks: int, tmp_path: Path) -> None:
    batch = smallest_batch(ranks)
    config = write(tmp_path, LAYOUTS[ranks], batch__global_batch_size=batch)
    try_all(ranks, config, (Trial("spiky", (*ROLLS_BACK, *FLAT)),))
    (event,) = events(config, "spiky", "roll_back")
    steps = [record["step"] for record in records(config, "spiky")]
    assert steps == list(range(1, 13)), "each step has one record, that of the run that counts"
    assert event["step"] > 8 and event["to_step"] == (event["step"] - 1) // 2 * 2
    skipped = batch * (event["step"] - event["to_step"] + 1)  # and the step that spike_skip_steps adds
    assert event["data_skip"] == [[batch * event["to_step"], skipped]]
    try_all(ranks, config, (Trial("clean", (*FLAT, f"data.skip={event['data_skip']}")),))
    assert digests(config, "spiky") == digests(config, "clean")
    losses = [[record["loss"] for record in records(config, name)] for name in ("spiky", "clean")]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_what_was_passed_over_survives_a_resume(tmp_path: Path) -> None:
    config = write(tmp_path, LAYOUTS[1], batch__global_batch_size=2)
    try_all(1, config, (Trial("spiky", (*ROLLS_BACK, *FLAT)),))
    (event,) = events(config, "spiky", "roll_back")
    longer = (*FLAT, "train.total_steps=16")
    try_all(1, config, (Trial("spiky", (*ROLLS_BACK, *longer)),))
    assert len(events(config, "spiky", "roll_back")) == 1, "the one that spike_max allows was counted"
    try_all(1, config, (Trial("clean", (*longer, f"data.skip={event['data_skip']}")),))
    assert digests(config, "spiky") == digests(config, "clean")


@pytest.mark.slow
def test_a_second_spike_after_one_checkpoint_is_of_later_data(tmp_path: Path) -> None:
    config = write(tmp_path, LAYOUTS[1], batch__global_batch_size=2)
    rare = ("guard.spike_max=2", "train.checkpoint_every=8")
    try_all(1, config, (Trial("spiky", (*ROLLS_BACK, *FLAT, *rare)),))
    first, second = events(config, "spiky", "roll_back")
    assert first["to_step"] == second["to_step"] == 8
    ((begin, count),), ((again, more),) = first["data_skip"], second["data_skip"]
    passed = 2 * (second["step"] - 8 + 1)  # what was read since the first one, and the step that is added
    assert (again, more) == (begin, count + passed)
    clean = (*FLAT, *rare, f"data.skip={second['data_skip']}")
    try_all(1, config, (Trial("clean", clean),))
    assert digests(config, "spiky") == digests(config, "clean")
