"""Planted text: the words of the source with needles on lines of their own, as dense as told."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.evaluation.needle import FORMS
from moe_runtime.evaluation.planting import KEPT, plant, planted

TEXT = "def fox(x):\n\n    return x\n" * 400
NEEDLE = re.compile(r"^needle = '([A-Z])\1{3}'\n", re.MULTILINE)


def grown(every: float) -> str:
    return plant(TEXT, FORMS["taught"], every, np.random.default_rng(0))


def test_needles_stand_on_lines_of_their_own_and_leave_the_text_as_it_was() -> None:
    assert NEEDLE.sub("", grown(30.0)) == TEXT != grown(30.0)


@pytest.mark.parametrize("every", [30.0, 200.0])
def test_needles_are_as_dense_as_told(every: float) -> None:
    expected = len(TEXT) / every
    # A Poisson count is within four of its standard deviations.
    assert abs(len(NEEDLE.findall(grown(every))) - expected) < 4 * expected**0.5


def test_most_needles_repeat_the_value_before_them_and_all_letters_come() -> None:
    letters = NEEDLE.findall(grown(5.0))
    same = np.mean([a == b for a, b in pairwise(letters)])
    chance = KEPT + (1 - KEPT) / 26
    assert abs(same - chance) < 4 * (chance * (1 - chance) / len(letters)) ** 0.5
    assert len(set(letters)) == 26


def test_the_documents_of_a_split_are_planted_alike_for_a_seed(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"document {number}\n" + TEXT[:390])
    prepare(Request(f"dir:{tmp_path}", "byte", 0, 0.0, 0.3), tmp_path / "data")
    dataset = TokenDataset.open(tmp_path / "data", "train")
    first, again, other = (list(planted(dataset, FORMS["taught"], 30.0, seed)) for seed in (0, 0, 1))
    assert first == again and len(first) == dataset.record.documents
    plain = [NEEDLE.sub("", text) for text in first]
    assert plain == [NEEDLE.sub("", text) for text in other] and first != other
    assert all(text.startswith("document ") and text.endswith("x\n") for text in plain)
    assert NEEDLE.findall(first[0]) != NEEDLE.findall(first[1])
