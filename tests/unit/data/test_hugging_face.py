"""AutoTokenizer gives the ids that our tokenizers give, on awkward text too."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_runtime.data.bpe import train_bpe
from moe_runtime.data.hugging_face import byte_json, hub_files, tokenizer_of_hub
from moe_runtime.data.vocabulary import SPECIALS, ByteTokenizer, Tokenizer
from moe_runtime.errors import DataError

AWKWARD = (
    "", "a", " a  b\n\n\tc \r\n", "\x00\x01\x7f\x80\xff", "é e\u0301", "\ufeff\u200d\u2028\u00a0",
    "日本語 😀👩‍👩‍👧",
    *SPECIALS, "<|eos|><|fim_begin|>x<|eos|>", "1234567 0.5e-3", "[CLS]</s><0x41>", "\U0010ffff\ue000",
)  # fmt: skip


def random_texts() -> Iterator[str]:
    rng = random.Random(0)
    spans = ((0, 128), (0, 0xD800), (0xE000, 0x110000))
    for _ in range(200):
        yield "".join(chr(rng.randrange(*rng.choice(spans))) for _ in range(40))


def byte() -> Tokenizer:
    return ByteTokenizer()


def bpe() -> Tokenizer:
    return train_bpe(iter(["the quick brown fox 123 jumps\n  over the lazy dog é日本 "] * 20), 320)


@pytest.mark.parametrize("make", [byte, bpe])
def test_autotokenizer_gives_our_ids_and_text(make: object, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours: Tokenizer = make()  # type: ignore[operator]
    for name, data in hub_files(ours).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    assert theirs.eos_token_id == ours.eos_id and len(theirs) == ours.vocab_size
    for text in (*AWKWARD, *random_texts()):
        ids = ours.encode(text).tolist()
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids) == text
    assert theirs.decode([ours.eos_id, *ours.encode("x")], skip_special_tokens=True) == "x"


def test_the_byte_tokenizer_is_recognised_and_others_are_kept_as_they_are(tmp_path: Path) -> None:
    assert tokenizer_of_hub(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text(byte_json())
    assert isinstance(tokenizer_of_hub(tmp_path), ByteTokenizer)
    text = bpe().to_json()
    (tmp_path / "tokenizer.json").write_text(text)
    found = tokenizer_of_hub(tmp_path)
    assert found is not None and found.to_json() == text
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(DataError, match="no end-of-text token"):
        tokenizer_of_hub(tmp_path)
