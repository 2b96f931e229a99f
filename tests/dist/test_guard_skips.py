"""A gradient that is not finite, and a loss that stands out, in real runs on four ranks."""

from pathlib import Path

import pytest

from tests.dist.guard_world import RANKS, Outcome, Strike, Trial, digests, do_trials, events, records, write
from tests.ranks import run_ranks

WINDOW = 8
ROLLS_BACK = (
    "guard.spike_z=0.4",
    f"guard.spike_window={WINDOW}",
    "guard.spike_action=roll_back",
    "guard.spike_max=1",
    "guard.spike_skip_steps=1",
)
# A learning rate of nothing: what is left of the loss is how its batches differ, so one will stand out.
FLAT = ("optim.peak_lr=1e-6", "train.total_steps=14", "layout.dp=1", "layout.ep=1")
TRIALS = (
    Trial("nan", strikes=(Strike("nan", "grad", rank=1, step=3, phase="optimizer"),)),
    Trial("left_out", ("train.skip_updates=[3]",)),
    Trial(
        "diverged",
        ("guard.max_skips=3",),
        strikes=(Strike("inf", "grad", rank=2, step=3, phase="optimizer", times=5),),
    ),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[Outcome]]]:
    config = write(tmp_path_factory.mktemp("guards"), train__eval_every=0, train__log_every=100)
    outcomes = run_ranks(do_trials, RANKS, config, TRIALS)
    by_name = {trial.name: [seen[i] for seen in outcomes] for i, trial in enumerate(TRIALS)}
    return config, by_name


def test_one_nan_on_one_rank_skips_the_step_and_is_named(runs: tuple) -> None:
    config, outcomes = runs
    assert [outcome.error for outcome in outcomes["nan"]] == [None] * RANKS
    (event,) = events(config, "nan", "skipped")
    (hit,) = outcomes["nan"][1].hit
    assert event["step"] == 3 and event["in_row"] == 1
    (culprit,) = event["culprits"]
    assert culprit["rank"] == 1 and hit == f"{culprit['name']}[{culprit['first']}]"
    assert [record["skipped"] for record in records(config, "nan")] == [False, False, True] + [False] * 5


def test_a_skipped_step_is_that_of_a_clean_run_told_to_leave_it_out(runs: tuple) -> None:
    config, outcomes = runs
    assert [outcome.error for outcome in outcomes["left_out"]] == [None] * RANKS
    assert digests(config, "nan") == digests(config, "left_out")
    (event,) = events(config, "left_out", "skipped")
    assert event["step"] == 3 and "train.skip_updates" in event["message"]


def test_steps_skipped_in_a_row_end_the_run_on_all_ranks(runs: tuple) -> None:
    config, outcomes = runs
    errors = {outcome.error for outcome in outcomes["diverged"]}
    (error,) = errors
    assert error is not None and "3 steps in a row" in error and "on rank 2: 1 infinite" in error
    assert [event["in_row"] for event in events(config, "diverged", "skipped")] == [1, 2, 3]
    (stopped,) = events(config, "diverged", "stopped")
    assert stopped["message"] == error


def test_a_spike_rolls_back_and_goes_on_as_a_clean_run_without_that_data(runs: tuple) -> None:
    config, _ = runs
    run_ranks(do_trials, 2, config, (Trial("spiky", (*ROLLS_BACK, *FLAT)),))
    (event,) = events(config, "spiky", "roll_back")
    steps = [record["step"] for record in records(config, "spiky")]
    assert steps == list(range(1, 15)), "each step has one record, that of the run that counts"
    assert 8 < event["step"] and event["to_step"] == (event["step"] - 1) // 2 * 2
    skipped = 8 * (event["step"] - event["to_step"] + 1)  # and the step that spike_skip_steps adds
    assert event["data_skip"] == [[8 * event["to_step"], skipped]]
    clean = Trial("clean", (*FLAT, f"data.skip={event['data_skip']}"))
    run_ranks(do_trials, 2, config, (clean,))
    assert digests(config, "spiky") == digests(config, "clean")
    losses = [[record["loss"] for record in records(config, name)] for name in ("spiky", "clean")]
    assert losses[0] == losses[1]
