"""Draws: numbers that depend on seed, stream and token alone, and are uniform."""

import torch

from moe_runtime.generate.draws import BLOCK, Draws
from tests.unit.generate.goodness_of_fit import g_test_p_value


def all_of(draws: Draws, rows: int, count: int) -> torch.Tensor:
    return draws.at("pick", torch.arange(count).expand(rows, count))


def test_a_row_has_the_same_numbers_alone_and_in_any_batch_and_order() -> None:
    together = Draws([5, 6, 7])
    index = torch.tensor([[3, 900], [0, BLOCK], [BLOCK - 1, 1]])
    found = together.at("accept", index)
    for row, seed in enumerate([5, 6, 7]):
        alone = Draws([seed])
        for column in (1, 0):
            assert alone.at("accept", index[row : row + 1, column]) == found[row, column]
    kept = together.keep([2, 0])
    assert torch.equal(kept.at("accept", index[[2, 0]]), found[[2, 0]])
    assert torch.equal(kept.at("pick", index[[2, 0]]), Draws([7, 5]).at("pick", index[[2, 0]]))


def test_numbers_are_uniform_and_lie_in_the_unit_interval() -> None:
    numbers = all_of(Draws(range(200)), 200, 500)
    assert float(numbers.min()) >= 0 and float(numbers.max()) < 1
    for values in (numbers, numbers * 997 % 1):  # coarse bits, finer bits
        counts = torch.bincount((values.flatten() * 50).long(), minlength=50)
        assert g_test_p_value(counts, torch.full((50,), 0.02)) > 1e-3


def test_neighbouring_tokens_seeds_and_streams_are_independent() -> None:
    draws = Draws(range(200))
    index = torch.arange(400).expand(200, 400)
    pick, accept = draws.at("pick", index), draws.at("accept", index)
    pairs = {"tokens": (pick[:, 1:], pick[:, :-1]), "seeds": (pick[1:], pick[:-1]), "streams": (pick, accept)}
    for first, second in pairs.values():
        cells = (first * 8).long() * 8 + (second * 8).long()
        counts = torch.bincount(cells.flatten(), minlength=64)
        assert g_test_p_value(counts, torch.full((64,), 1 / 64)) > 1e-3


def test_a_number_has_more_bits_than_float32() -> None:
    numbers = all_of(Draws([0]), 1, 500)
    assert bool((numbers != numbers.float().double()).any())


def test_no_tokens_give_no_numbers() -> None:
    assert Draws([1, 2]).at("accept", torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0)
