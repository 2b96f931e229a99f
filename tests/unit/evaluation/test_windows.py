"""Windows over documents: every token once, with enough before it; texts that a tokenizer cannot spell."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moe_runtime.data.bpe import JsonTokenizer
from moe_runtime.data.prepare import prepare
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.task import Request
from moe_runtime.data.vocabulary import EOS
from moe_runtime.errors import DataError
from moe_runtime.evaluation.documents import Text, read_texts
from moe_runtime.evaluation.windows import document_nats, spans, spelled
from tests.unit.evaluation.samples import BYTES, slow_log_likelihood, small_model, wrapped


@given(length=st.integers(1, 300), context=st.integers(2, 70))
def test_every_token_is_predicted_once_with_half_a_window_before_it(length: int, context: int) -> None:
    predicted = []
    for begin, end, fresh in spans(length, context):
        assert 0 <= begin < end <= length and end - begin <= context + 1
        places = range(end - fresh, end)
        assert all(place - begin >= min(place, context // 2) for place in places)
        predicted += places
    assert predicted == list(range(1, length))


def test_nats_are_those_of_the_rule_spelt_out() -> None:
    plain, text = small_model(BYTES).eval(), Text("doc", ".", "def f(x): return x" * 3)
    whole, context = [BYTES.eos_id, *text.text.encode()], 16
    total = 0.0
    for place in range(1, len(whole)):
        # The first window that reaches the place: 0 up to 16, then steps of 8.
        number = max(0, -(-(place - context) // 8))
        total -= slow_log_likelihood(plain, whole[8 * number : place + 1], 1)
    found = document_nats(wrapped(BYTES), [Text("short", ".", "a"), text], context)
    assert found[1] == pytest.approx(total, rel=1e-6)


def test_a_tokenizer_that_cannot_spell_a_text_is_told_of_with_the_place() -> None:
    words = Backend(models.WordLevel({EOS: 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    model = wrapped(JsonTokenizer(words.to_str(), "words"))
    with pytest.raises(DataError, match=r"small: expected a tokenizer that spells doc 3.* at byte 1;"):
        spelled(model, Text("doc 3", ".", "aéb"))
    assert spelled(model, Text("doc 3", ".", "abb")) == [2, 3, 3]


def test_texts_are_spread_over_a_split_and_cut_where_a_character_ends(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    for number in range(20):
        (root / f"p{number % 3}").mkdir(parents=True, exist_ok=True)
        (root / f"p{number % 3}" / f"{number}.txt").write_text(f"{number} " + "é" * 40)
    for tokenizer in ("byte", "bpe:300"):
        prepare(Request(f"dir:{root}", tokenizer, 0, 0.0, 0.45), tmp_path / tokenizer.replace(":", ""))
    dataset = TokenDataset.open(tmp_path / "byte", "validation")
    texts = read_texts(dataset, 4, 16)
    assert len(texts) == 4 and all(text.text.strip("é0123456789 ") == "" for text in texts)
    assert all(15 <= text.num_bytes <= 16 for text in texts)
    numbers = [int(text.where.split()[1]) for text in texts]
    assert numbers[0] == 0 and numbers[-1] == dataset.record.documents - 1
    everything = read_texts(dataset, None, 10_000)
    other = read_texts(TokenDataset.open(tmp_path / "bpe300", "validation"), None, 10_000)
    assert [(one.text, one.part) for one in everything] == [(one.text, one.part) for one in other]
    assert {one.part for one in everything} <= {"p0", "p1", "p2"} and sum(
        one.num_bytes for one in everything
    ) == dataset.record.bytes
