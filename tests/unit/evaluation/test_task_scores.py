"""Items scored in batches against one at a time through the plain model; ties, cuts and intervals."""

import random
from pathlib import Path

import pytest

from moe_runtime.data.vocabulary import Tokenizer
from moe_runtime.errors import DataError
from moe_runtime.evaluation.intervals import share_interval
from moe_runtime.evaluation.language_model import Pair, pair_of, prompt_of, split_ids
from moe_runtime.evaluation.task_items import ChoiceItem, TargetItem, read_items
from moe_runtime.evaluation.task_scores import (
    ChoiceScore,
    TargetScore,
    choose,
    score_items,
    summarise,
)
from moe_runtime.generate.decode_reference import generate
from moe_runtime.generate.stop import first_stop
from tests.unit.evaluation.samples import (
    BYTES,
    CONTEXT,
    item_lines,
    slow_log_likelihood,
    small_bpe,
    small_model,
    wrapped,
    write_items,
)


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return small_bpe()


@pytest.mark.parametrize("limits", [{}, {"batch_slots": 150, "batch_rows": 5}, {"batch_rows": 1}])
def test_ragged_pairs_are_those_of_one_at_a_time(limits: dict[str, int]) -> None:
    draw = random.Random(3)
    contexts = [tuple(draw.randrange(264) for _ in range(draw.randrange(1, 40))) for _ in range(7)]
    pairs = [
        Pair(draw.choice(contexts), tuple(draw.randrange(264) for _ in range(draw.choice((1, 1, 2, 9, 30)))))
        for _ in range(30)
    ]
    plain, model = small_model(BYTES).eval(), wrapped(BYTES, **limits)
    found = model.log_likelihoods(pairs)
    for pair, value in zip(pairs, found, strict=True):
        wanted = slow_log_likelihood(plain, [*pair.context, *pair.continuation], len(pair.continuation))
        assert value == pytest.approx(wanted, rel=1e-5, abs=1e-4)


def test_nats_of_ragged_windows_are_those_of_one_at_a_time() -> None:
    draw = random.Random(5)
    windows = [[draw.randrange(264) for _ in range(draw.randrange(2, 40))] for _ in range(12)]
    plain = small_model(BYTES).eval()
    for window, nats in zip(windows, wrapped(BYTES, batch_slots=90).token_nats(windows), strict=True):
        assert len(nats) == len(window) - 1
        wanted = slow_log_likelihood(plain, window, len(window) - 1)
        assert -sum(nats) == pytest.approx(wanted, rel=1e-5)


def test_items_of_a_file_come_to_what_the_plain_model_says(tmp_path: Path, bpe: Tokenizer) -> None:
    items = read_items(write_items(tmp_path / "items.jsonl", item_lines(12, 6)))
    for tokenizer in (BYTES, bpe):
        plain, model = small_model(tokenizer).eval(), wrapped(tokenizer)
        for item, score in zip(items, score_items(model, items), strict=True):
            assert score.item is item
            if isinstance(item, ChoiceItem):
                assert isinstance(score, ChoiceScore)
                for choice, value in zip(item.choices, score.log_likelihoods, strict=True):
                    before, after = split_ids(model, item.context, choice)
                    ids = [*before, *after][-(CONTEXT + 1) :]
                    wanted = slow_log_likelihood(plain, ids, len(after))
                    assert value == pytest.approx(wanted, rel=1e-5, abs=1e-4)
            else:
                assert isinstance(score, TargetScore)
                ids = [int(one) for one in tokenizer.encode(item.context)][-(CONTEXT - 12) :]
                text = tokenizer.decode(generate(plain, ids, 12, stop_ids=(tokenizer.eos_id,)))
                cut = first_stop(text, item.stop)
                assert score.text == text[:cut]


def test_white_space_before_a_continuation_goes_to_it(bpe: Tokenizer) -> None:
    model = wrapped(bpe)
    before, after = split_ids(model, "return  ", "self")
    assert before == bpe.encode("return").tolist()
    assert model.spell([*before, *after]) == b"return  self"
    before, after = split_ids(model, "", "self")
    assert (before, model.spell(after)) == ([bpe.eos_id], b"self")
    before, after = split_ids(model, " \n", "self")
    assert (before, model.spell(after)) == ([bpe.eos_id], b" \nself")


def test_what_is_longer_than_the_window_loses_its_beginning_and_is_counted() -> None:
    model = wrapped(BYTES, context=8)
    pair = pair_of(model, "0123456789", "ab", "f:1")
    assert pair == Pair(tuple(b"3456789"), tuple(b"ab"), True)  # reads 8: seven, and the a
    assert not pair_of(model, "3456789", "ab", "f:1").is_cut
    with pytest.raises(DataError, match="f:1: expected texts to score of at most 8 tokens"):
        pair_of(model, "0", "123456789", "f:1")
    assert prompt_of(model, "0123456789", (), 3, "f:1").context == tuple(b"56789")
    with pytest.raises(DataError, match="f:1: expected max_tokens below 8"):
        prompt_of(model, "0", (), 8, "f:1")


def item(*choices: str, answer: int = 0) -> ChoiceItem:
    return ChoiceItem("f:1", "1", "", choices, answer)


def test_ties_go_to_the_first_and_are_told() -> None:
    score = choose(item("a", "b", "c", answer=1), [-3.0, -1.0, -1.0], False)
    assert (score.by_sum, score.ties, score.metrics["acc"]) == (1, True, 1.0)
    assert choose(item("a", "a", answer=1), [-1.0, -1.0], False).metrics == {"acc": 0.0, "acc_norm": 0.0}


def test_the_norm_is_over_bytes() -> None:
    score = choose(item("ab", "éé"), [-3.0, -4.0], False)
    assert (score.by_sum, score.by_bytes, score.ties) == (0, 1, False)  # -3 / 2 against -4 / 4


def test_a_summary_counts_items_ties_and_cuts() -> None:
    target = TargetItem("f:2", "2", "", " x\n", (), 4)
    scores = [
        choose(item("a", "b"), [-1.0, -1.0], True),
        choose(item("a", "b"), [-2.0, -1.0], False),
        TargetScore(target, "x", False),
    ]
    found = summarise(scores)
    assert {name: one.mean for name, one in found.metrics.items()} == {
        "acc": 0.5, "acc_norm": 0.5, "exact": 1.0,
    }  # fmt: skip
    assert (found.items["acc"], found.items["exact"], found.ties, found.cut) == (2, 1, 1, 1)


def test_a_share_of_few_has_a_wide_interval_even_if_all_are_right() -> None:
    found = share_interval([1.0] * 10)
    # Wilson by hand: n / (n + z^2) with z = 1.95996.
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(10 / (10 + 1.959964**2), rel=1e-5)
