"""A tokenizer as Hugging Face's AutoTokenizer reads it: tokenizer.json and tokenizer_config.json.

The byte tokenizer becomes a byte-level BPE without merges, whose vocabulary gives every byte its own value as
id. Control ids never come from text here, so `split_special_tokens` is set: a text that spells `<|eos|>` out
is encoded as text there too. What has no Unicode form (lone surrogates) only our own encoder takes.
"""

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from moe_runtime.data.bpe import JsonTokenizer, byte_alphabet
from moe_runtime.data.vocabulary import SPECIALS, ByteTokenizer, Tokenizer

TOKENIZER_JSON, TOKENIZER_CONFIG_JSON = "tokenizer.json", "tokenizer_config.json"


def hub_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files that AutoTokenizer loads, by name.

    Their encoder gives the ids of `tokenizer.encode`; with `add_special_tokens=False` where the
    tokenizer.json is not ours and adds some.
    """
    text = byte_json() if isinstance(tokenizer, ByteTokenizer) else tokenizer.to_json()
    eos = Backend.from_str(text).id_to_token(tokenizer.eos_id)
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
    }
    config = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    return {TOKENIZER_JSON: text.encode(), TOKENIZER_CONFIG_JSON: config.encode()}


def tokenizer_of_hub(folder: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face model; None if the folder has no tokenizer.json.

    Raises:
        DataError: it holds no usable tokenizer, such as one without an end-of-text token.
    """
    file = folder / TOKENIZER_JSON
    if not file.is_file():
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    return ByteTokenizer() if _is_byte_form(text) else JsonTokenizer(text, str(file))


@cache
def byte_json() -> str:
    """The byte tokenizer as a tokenizer.json of `tokenizers`."""
    backend = Backend(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS])
    return backend.to_str(pretty=True)


def _is_byte_form(text: str) -> bool:
    try:
        return bool(json.loads(text) == json.loads(byte_json()))
    except ValueError:
        return False
