"""One flipped bit in weights, optimizer state or a gradient of one rank, in real runs on four ranks."""

from pathlib import Path

import pytest

from tests.dist.guard_world import RANKS, Outcome, Strike, Trial, digests, do_trials, events, records, write
from tests.ranks import run_ranks

TRIALS = (
    Trial("clean", ("guard.digest_every=0",)),
    Trial("weights", (), (Strike("flip", "param", rank=2, step=5, phase="data"),)),
    Trial("written", (), (Strike("flip", "param", rank=3, step=4, phase="evaluate", is_written=True),)),
    Trial("master", (), (Strike("flip", "optimizer", rank=1, step=6, phase="step"),)),
    Trial("grad", ("guard.replay_every=3",), (Strike("flip", "grad", rank=3, step=6, phase="optimizer"),)),
    Trial("bad_memory", (), (Strike("flip", "param", rank=2, step=3, phase="data", times=2),)),
    Trial("stops", ("guard.digest_action=stop",), (Strike("flip", "param", 0, step=2, phase="optimizer"),)),
)
SURVIVED = {"weights": 2, "written": 3, "master": 1, "grad": 3}  # and the rank that was struck


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, list[Outcome]]]:
    config = write(tmp_path_factory.mktemp("bits"), train__eval_every=4, train__log_every=100)
    outcomes = run_ranks(do_trials, RANKS, config, TRIALS)
    by_name = {trial.name: [seen[i] for seen in outcomes] for i, trial in enumerate(TRIALS)}
    return config, by_name


@pytest.mark.parametrize("name", SURVIVED)
def test_a_flipped_bit_is_named_and_the_run_ends_as_a_clean_one(runs: tuple, name: str) -> None:
    config, outcomes = runs
    assert [outcome.error for outcome in outcomes[name]] == [None] * RANKS
    (hit,) = outcomes[name][SURVIVED[name]].hit
    (event,) = events(config, name, "corruption")
    (damage,) = event["damages"]
    assert damage["rank"] == SURVIVED[name] and damage["tensors"] == [hit.partition("[")[0]]
    assert not event["persistent"] and "transient" in event["message"]
    assert digests(config, name) == digests(config, "clean")


def test_optimizer_state_comes_back_from_the_newest_checkpoint(runs: tuple) -> None:
    config, _ = runs
    (event,) = events(config, "master", "roll_back")
    assert (event["step"], event["to_step"], event["data_skip"]) == (5, 4, [])
    assert [record["step"] for record in records(config, "master")] == list(range(1, 9))


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
