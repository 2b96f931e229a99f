import numpy as np
import pytest

from moe_runtime.data.order import permuted


def order(size: int, seed: int, epoch: int) -> list[int]:
    positions = np.arange(size, dtype=np.int64)
    return permuted(positions, np.full(size, epoch, dtype=np.int64), size, seed).tolist()


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4095, 4097, 65_537])
def test_order_is_a_bijection_of_any_size(size: int) -> None:
    assert sorted(order(size, seed=7, epoch=3)) == list(range(size))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert order(1000, 1, 0) == order(1000, 1, 0)
    assert order(1000, 1, 0) != order(1000, 2, 0)
    assert order(1000, 1, 0) != order(1000, 1, 1)


def test_single_positions_agree_with_the_whole_order_across_epochs() -> None:
    positions, epochs = np.array([5, 0, 99, 5]), np.array([0, 4, 2, 1])
    got = permuted(positions, epochs, 100, 11)
    assert got.tolist() == [
        order(100, 11, epoch)[place] for place, epoch in zip(positions, epochs, strict=True)
    ]


def test_order_is_pinned() -> None:
    # A resumed run must meet the same order in every version.
    assert order(10, 1234, 0) == PINNED
    assert permuted(np.array([12345]), np.array([2]), 10**12, 2**70 + 1).tolist() == [PINNED_LARGE]


def test_every_place_is_equally_likely() -> None:
    # 4000 draws over 10 places: standard deviation 19, so 5 of them.
    places = permuted(np.full(4000, 3), np.arange(4000), 10, seed=1)
    counts = np.bincount(places, minlength=10)
    assert abs(counts - 400).max() < 95


def test_neighbours_are_scattered() -> None:
    steps = np.abs(np.diff(order(100_000, 5, 0)))
    # Two independent uniform places lie a third of the range apart on average.
    assert abs(steps.mean() / 100_000 - 1 / 3) < 0.01


PINNED = [1, 2, 3, 5, 0, 4, 9, 6, 7, 8]
PINNED_LARGE = 546571314962
