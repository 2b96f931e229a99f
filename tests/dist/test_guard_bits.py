"""One flipped bit in weights, optimizer state or a gradient of one rank, in real runs."""

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

STEPS = 6
WRITTEN = Strike("flip", "param", rank=1, step=4, phase="evaluate", is_written=True)
# By number of ranks; no rank twice, for that would end the run.
STRIKES = {
    2: (
        Strike("flip", "grad", rank=1, step=2, phase="optimizer"),
        Strike("flip", "param", rank=1, step=3, phase="data"),
        Strike("flip", "optimizer", rank=0, step=6, phase="step"),
    ),
    4: (
        Strike("flip", "grad", rank=3, step=2, phase="optimizer"),
        Strike("flip", "param", rank=2, step=3, phase="data"),
        WRITTEN,
        Strike("flip", "optimizer", rank=0, step=6, phase="step"),
    ),
}


def trials(ranks: int) -> tuple[Trial, ...]:
    memory = (Strike("flip", "param", rank=1, step=3, phase="optimizer"), WRITTEN)
    return (
        Trial("clean", ("guard.digest_every=0",)),
        Trial("struck", ("guard.replay_every=2",), STRIKES[ranks]),
        Trial("bad_memory", (), memory),
        Trial("stops", ("guard.digest_action=stop",), (Strike("flip", "param", 0, step=2, phase="step"),)),
    )


Runs = tuple[str, tuple[Strike, ...], dict[str, list[Outcome]]]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    ranks = request.param
    config = write(
        tmp_path_factory.mktemp("bits"),
        LAYOUTS[ranks],
        train__eval_every=4,
        train__ema_decay=None,
        train__total_steps=STEPS,
        batch__global_batch_size=smallest_batch(ranks),
    )
    return config, STRIKES[ranks], try_all(ranks, config, trials(ranks))


def test_every_flipped_bit_is_named_and_the_run_ends_as_a_clean_one(runs: Runs) -> None:
    config, strikes, outcomes = runs
    assert {outcome.error for outcome in outcomes["struck"]} == {None}
    found = events(config, "struck", "corruption")
    assert [event["step"] for event in found] == [strike.step for strike in strikes]
    hits = {rank: list(outcome.hit) for rank, outcome in enumerate(outcomes["struck"])}
    for event, strike in zip(found, strikes, strict=True):
        hit = hits[strike.rank].pop(0)
        (damage,) = event["damages"]
        assert damage["rank"] == strike.rank and damage["tensors"] == [hit.partition("[")[0]]
        assert not event["persistent"] and "transient" in event["message"]
    assert digests(config, "struck") == digests(config, "clean")


def test_optimizer_state_comes_back_from_the_newest_checkpoint(runs: Runs) -> None:
    config, _, _ = runs
    (event,) = events(config, "struck", "roll_back")
    assert (event["step"], event["to_step"], event["data_skip"]) == (5, 4, [])
    assert [record["step"] for record in records(config, "struck")] == list(range(1, STEPS + 1))


def test_a_rank_that_is_damaged_again_after_healing_ends_the_run(runs: Runs) -> None:
    config, _, outcomes = runs
    (error,) = {outcome.error for outcome in outcomes["bad_memory"]}
    assert error is not None and "persistent" in error and "rank 1" in error and "step 4" in error
    assert "is not what its replicas hold" in error
    assert [event["persistent"] for event in events(config, "bad_memory", "corruption")] == [False, True]


def test_the_run_ends_at_once_where_the_config_says_stop(runs: Runs) -> None:
    config, _, outcomes = runs
    (error,) = {outcome.error for outcome in outcomes["stops"]}
    assert error is not None and "guard.digest_action is stop" in error and "rank 0: weights of" in error
    assert [record["step"] for record in records(config, "stops")] == [1]


@pytest.mark.slow
def test_an_average_that_may_have_read_a_flipped_weight_comes_back_too(tmp_path: Path) -> None:
    config = write(tmp_path, LAYOUTS[2], train__total_steps=STEPS, train__ema_decay=0.5)
    strike = Strike("flip", "param", rank=0, step=5, phase="data")
    outcomes = try_all(2, config, (Trial("clean"), Trial("struck", (), (strike,))))
    assert {outcome.error for outcome in outcomes["struck"]} == {None}
    (event,) = events(config, "struck", "roll_back")
    assert event["to_step"] == 4
    assert digests(config, "struck") == digests(config, "clean")
