"""One flipped bit in weights, optimizer state or a gradient of one rank, in real runs on four ranks."""

from pathlib import Path

import pytest

from tests.dist.guard_world import RANKS, Outcome, Strike, Trial, digests, do_trials, events, records, write
from tests.ranks import run_ranks

TRIALS = (
    Trial("clean", ("guard.digest_every=0",)),
    Trial(
        "struck",
        ("guard.replay_every=2",),
        (
            Strike("flip", "grad", rank=0, step=2, phase="optimizer"),
            Strike("flip", "param", rank=2, step=3, phase="data"),
            Strike("flip", "param", rank=3, step=4, phase="evaluate", is_written=True),
            Strike("flip", "optimizer", rank=1, step=6, phase="step"),
        ),
    ),
    Trial("bad_memory", (), (Strike("flip", "param", rank=2, step=3, phase="data", times=2),)),
    Trial("stops", ("guard.digest_action=stop",), (Strike("flip", "param", 0, step=2, phase="optimizer"),)),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[Outcome]]]:
    config = write(tmp_path_factory.mktemp("bits"), train__eval_every=4, train__log_every=100)
    outcomes = run_ranks(do_trials, RANKS, config, TRIALS)
    by_name = {trial.name: [seen[i] for seen in outcomes] for i, trial in enumerate(TRIALS)}
    return config, by_name


def test_every_flipped_bit_is_named_and_the_run_ends_as_a_clean_one(runs: tuple) -> None:
    config, outcomes = runs
    assert [outcome.error for outcome in outcomes["struck"]] == [None] * RANKS
    found = events(config, "struck", "corruption")
    struck = TRIALS[1].strikes
    assert [event["step"] for event in found] == [strike.step for strike in struck]
    for event, strike in zip(found, struck, strict=True):
        (hit,) = outcomes["struck"][strike.rank].hit
        (damage,) = event["damages"]
        assert damage["rank"] == strike.rank and damage["tensors"] == [hit.partition("[")[0]]
        assert not event["persistent"] and "transient" in event["message"]
    assert digests(config, "struck") == digests(config, "clean")


def test_optimizer_state_comes_back_from_the_newest_checkpoint(runs: tuple) -> None:
    config, _ = runs
    (event,) = events(config, "struck", "roll_back")
    assert (event["step"], event["to_step"], event["data_skip"]) == (5, 4, [])
    assert [record["step"] for record in records(config, "struck")] == list(range(1, 9))


def test_a_rank_that_is_damaged_again_after_healing_ends_the_run(runs: tuple) -> None:
    config, outcomes = runs
    (error,) = {outcome.error for outcome in outcomes["bad_memory"]}
    assert error is not None and "persistent" in error and "rank 2" in error and "step 4" in error
    assert [event["persistent"] for event in events(config, "bad_memory", "corruption")] == [False, True]


def test_the_run_ends_at_once_where_the_config_says_stop(runs: tuple) -> None:
    config, outcomes = runs
    (error,) = {outcome.error for outcome in outcomes["stops"]}
    assert error is not None and "guard.digest_action is stop" in error and "rank 0: weights of" in error
    assert [record["step"] for record in records(config, "stops")] == [1]
