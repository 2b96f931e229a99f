"""Shares of a mixture: exact, even in every prefix, found from a number, and carried on over a change."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from moe_runtime.data.loader import BatchLoader
from moe_runtime.data.mixture import Mixture, Segment, quotas_of, resumed, turns
from moe_runtime.data.mixture_loader import MixtureLoader, set_seed
from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.errors import DataError

SAME = Fraction(1)


@pytest.mark.parametrize(
    "weights, quotas",
    [
        ({"a": 0.7, "b": 0.2, "c": 0.1}, {"a": 7, "b": 2, "c": 1}),
        ({"a": 3, "b": 0, "c": 1.5}, {"a": 2, "c": 1}),
        ({"a": 1e-9}, {"a": 1}),
        ({"a": 123_456_789.0, "b": 123_456_789.0}, {"a": 1, "b": 1}),
    ],
)
def test_simple_weights_are_met_exactly(weights: dict[str, float], quotas: dict[str, int]) -> None:
    assert quotas_of(weights) == quotas


def test_other_weights_are_rounded_by_largest_remainder() -> None:
    weights = {"a": 3.14159265, "b": 2.71828183, "c": 0.577215665}
    quotas = quotas_of(weights)
    assert sum(quotas.values()) == 2**16
    for name, weight in weights.items():
        assert abs(quotas[name] - 2**16 * weight / sum(weights.values())) < 1


def test_a_weight_that_would_never_be_read_is_refused() -> None:
    with pytest.raises(DataError, match=r"data.mixture.b.weight: expected at least 1/65536 .* set 0"):
        quotas_of({"a": 1.0, "b": 1.23456789e-7})


def test_every_prefix_has_its_shares_to_less_than_one_sequence() -> None:
    generator = np.random.default_rng(3)
    for sets in (2, 3, 5, 9):
        for _ in range(6):
            quotas = tuple(map(int, generator.integers(1, 80, sets)))
            whose, ranks = turns(quotas)
            had = np.cumsum(whose[:, None] == np.arange(sets), axis=0)
            ideal = np.arange(1, len(whose) + 1)[:, None] * np.array(quotas) / sum(quotas)
            assert np.abs(had - ideal).max() < 1
            assert had[-1].tolist() == list(quotas)
            assert all(ranks[whose == k].tolist() == list(range(quota)) for k, quota in enumerate(quotas))


def place(mixture: Mixture, numbers: np.ndarray) -> list[tuple[str, int]]:
    """Of each sequence its set and its number there."""
    found: list[tuple[str, int]] = [("", -1)] * len(numbers)
    for name, places, own in mixture.locate(numbers):
        for at, number in zip(places, own, strict=True):
            found[at] = (name, int(number))
    return found


def test_each_set_gives_its_sequences_in_order_and_counts_say_how_many() -> None:
    mixture = Mixture({"a": 5, "b": 3, "c": 1})
    walked = place(mixture, np.arange(500))
    for name in "abc":
        own = [number for found, number in walked if found == name]
        assert own == list(range(len(own)))
        assert mixture.counts(500)[name] == len(own)
        assert mixture.counts(123)[name] == sum(found == name for found, _ in walked[:123])
    far = 10**15 + np.array([7, 3, 5])  # any order, any size
    assert place(mixture, far)[1] == place(mixture, np.array([10**15 + 3]))[0]


def test_after_a_change_of_weights_each_set_goes_on_where_it_stood() -> None:
    first = Mixture({"a": 3, "b": 1})
    second = resumed({"a": 1, "b": 1, "c": 2}, first.to_json(), 101, SAME)
    third = resumed({"b": 1}, second.to_json(), 203, SAME)
    walked = place(third, np.arange(300))
    assert walked[:101] == place(first, np.arange(101))
    for name in "abc":
        own = [number for found, number in walked if found == name]
        assert own == list(range(len(own)))
    assert third.counts(300) == {name: sum(found == name for found, _ in walked) for name in "abc"}
    assert {found for found, _ in walked[203:]} == {"b"}


def test_a_resume_without_a_change_and_a_roll_back_before_one_leave_no_trace() -> None:
    quotas = {"a": 3, "b": 1}
    begun = Mixture(quotas)
    assert resumed(quotas, begun.to_json(), 40, SAME).segments == begun.segments
    changed = resumed({"a": 1, "b": 1}, begun.to_json(), 40, SAME)
    assert resumed(quotas, changed.to_json(), 30, SAME).segments == begun.segments
    assert resumed({"a": 1, "b": 1}, changed.to_json(), 40, SAME).segments == changed.segments
    anew = resumed(quotas, (), 40, SAME)
    assert anew.segments == (Segment(40, quotas, {}),) and anew.counts(44) == quotas


def test_longer_sequences_count_what_was_read_by_shorter_ones() -> None:
    begun = Mixture({"a": 3, "b": 1})
    longer = resumed({"a": 3, "b": 1}, begun.to_json(), 25, Fraction(1, 4))  # 100 sequences of a quarter
    assert longer.counts(25) == {"a": 19, "b": 7}  # 75 and 25 quarters, begun ones count as read


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BatchLoader]:
    """Two small sets, told apart by their letters."""
    folder = tmp_path_factory.mktemp("sets")
    loaders = {}
    for name, letter in (("low", "a"), ("high", "A")):
        (folder / f"{name}.txt").write_text(
            "".join(f"{chr(ord(letter) + i % 26) * 70}\n" * 9 for i in range(100))
        )
        prepare(Request(str(folder / f"{name}.txt")), folder / name)
        loaders[name] = BatchLoader(TokenDataset.open(folder / name), 32, 1, set_seed(5, name), 264)
    return loaders


def test_rows_of_a_mixture_are_those_of_its_sets(sets: dict[str, BatchLoader]) -> None:
    loader = MixtureLoader(sets, {"low": 3, "high": 1})
    rows = loader.sequences(0, 40)
    expected = {"low": 0, "high": 0}
    for row in rows:
        name = "low" if bool((row >= ord("a")).logical_and(row < 256).any()) else "high"
        assert torch.equal(row, sets[name].sequences(expected[name], 1)[0])
        expected[name] += 1
    assert expected == {"low": 30, "high": 10}
    for lane in range(4):
        assert torch.equal(loader.rows(range(lane, 40, 4)), rows[lane::4])
    epochs = loader.epochs(40)
    assert epochs == {name: expected[name] / sets[name].samples_per_epoch for name in sets}


def test_another_set_or_weight_leaves_the_order_within_a_set(sets: dict[str, BatchLoader]) -> None:
    own = {}
    for weights in ({"low": 3, "high": 1}, {"high": 5, "low": 2}, {"low": 1, "high": 0}):
        rows = MixtureLoader(sets, weights).sequences(0, 60)
        own[str(weights)] = rows[(rows >= ord("a")).logical_and(rows < 256).any(dim=1)][:10]
    first, *others = own.values()
    assert all(torch.equal(first, other) for other in others)


def test_what_differs_from_a_checkpoint_is_told(sets: dict[str, BatchLoader]) -> None:
    saved = MixtureLoader(sets, {"low": 3, "high": 1}).to_json()
    same, other = (MixtureLoader(sets, {"low": 3, "high": weight}) for weight in (1, 2))
    assert same.differences(saved) == []
    (said,) = other.differences(saved)
    assert said.startswith("data.mixture: was low 75 %, high 25 %, is low 60 %, high 40 %; each set goes on")
    assert other.differences({}) == ["data: now a mixture, each set from its beginning"]
    (said,) = same.differences(saved | {"fingerprints": {"low": "0" * 64}})
    assert said == "warning: data.mixture.low: other tokens than those the run began with"
