"""A slow rank is told within ten steps by its work alone; noise, larger batches, uneven stages tell none."""

import random

import pytest

from moe_runtime.train.straggler import Straggler, StragglerWatch, peers_of

LAYOUTS = {
    "four replicas": [[0, 1, 2, 3]],
    "two mirrored rows": [[0, 3], [1, 2]],
    "a pipeline without replicas": [[0], [1], [2], [3]],
}


def noisy(random_: random.Random, seconds: float) -> float:
    """A step's work: 10% spread, and one in twenty takes three times as long."""
    return seconds * random_.lognormvariate(0, 0.1) * (3 if random_.random() < 0.05 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(5))
def test_a_rank_that_becomes_slow_is_the_only_one_told_within_ten_steps(layout: str, seed: int) -> None:
    groups, random_ = LAYOUTS[layout], random.Random(seed)
    watch = StragglerWatch(peers_of(groups, 4), 1.5)
    # Without replicas stages differ by a factor of three, as one with a large head does.
    stage = [1.0 + (len(groups) == 4) * rank for rank in range(4)]

    def step(number: int, slow: float) -> list[Straggler]:
        batch = 1.0 + number / 50  # grows by the step
        work = [noisy(random_, batch * seconds) for seconds in stage]
        return watch.update([work[0], work[1], work[2] * slow, work[3]])

    for number in range(200):
        assert step(number, 1.0) == [], number
    told = [found for number in range(200, 210) for found in step(number, 2.0)]
    assert [(found.rank, found.is_slow) for found in told] == [(2, True)] and told[0].ratio > 1.5
    assert watch.worst[0] > 1.5
    told = [found for number in range(210, 220) for found in step(number, 1.0)]
    assert [(found.rank, found.is_slow) for found in told] == [(2, False)]


def test_a_replica_that_is_slow_from_the_start_is_told() -> None:
    watch = StragglerWatch(peers_of([[0, 1, 2]], 3), 1.5)
    told = [found for _ in range(10) for found in watch.update([1.0, 1.7, 1.0])]
    assert told == [Straggler(1, pytest.approx(1.7), True)]


def test_a_rank_alone_is_compared_with_nobody() -> None:
    watch = StragglerWatch(peers_of([[0]], 1), 1.5)
    assert all(watch.update([1.0 + step]) == [] for step in range(30)) and watch.worst[0] == 1.0
